/*
 * What programs ask of a CD-ROM drive besides its blocks, by way of Linux's cdrom and sr drivers: prints one
 * line for each request to /dev/sr0, with 0 or the error number and what came back.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/cdrom.h>
#include <scsi/sg.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void ask(int fd, const char *name, unsigned long request, unsigned long argument)
{
	errno = 0;
	int result = ioctl(fd, request, argument);

	printf("%s: %d error %d\n", name, result, errno);
}

int main(void)
{
	int fd = open("/dev/sr0", O_RDONLY | O_NONBLOCK);
	struct cdrom_multisession session = {.addr_format = CDROM_LBA};
	struct cdrom_tochdr header = {0, 0};
	struct cdrom_tocentry lead_out = {.cdte_track = CDROM_LEADOUT, .cdte_format = CDROM_LBA};
	int device = SG_SCSI_RESET_DEVICE;
	char block[2048];

	ask(fd, "drive", CDROM_DRIVE_STATUS, CDSL_CURRENT);
	ask(fd, "disc", CDROM_DISC_STATUS, 0);
	ask(fd, "session", CDROMMULTISESSION, (unsigned long)&session);
	ask(fd, "toc", CDROMREADTOCHDR, (unsigned long)&header);
	printf("tracks: %d to %d\n", header.cdth_trk0, header.cdth_trk1);
	ask(fd, "entry", CDROMREADTOCENTRY, (unsigned long)&lead_out);
	printf("lead-out: %d\n", lead_out.cdte_addr.lba);
	ask(fd, "lock", CDROM_LOCKDOOR, 1);
	ask(fd, "eject locked", CDROMEJECT, 0);
	ask(fd, "unlock", CDROM_LOCKDOOR, 0);
	ask(fd, "eject", CDROMEJECT, 0);
	/* Otherwise open closes the tray. */
	ioctl(fd, CDROM_CLEAR_OPTIONS, CDO_AUTO_CLOSE);
	ask(fd, "drive ejected", CDROM_DRIVE_STATUS, CDSL_CURRENT);
	errno = 0;
	int ejected = open("/dev/sr0", O_RDONLY);

	printf("open ejected: %d error %d\n", ejected, errno);
	ask(fd, "load", CDROMCLOSETRAY, 0);
	ask(fd, "drive loaded", CDROM_DRIVE_STATUS, CDSL_CURRENT);
	ask(fd, "reset", SG_SCSI_RESET, (unsigned long)&device);
	printf("read: %zd\n", read(open("/dev/sr0", O_RDONLY), block, sizeof block));
	return 0;
}
