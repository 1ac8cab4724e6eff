/* What hostile.c and hostile_pci.c share: two disks, one of them maltreated. */
#pragma once
#include "blk.h"

#define SECTOR 512u

extern struct virtio victim, neighbour;

/* Tell the outcome of a misdeed, reset the victim, and see whether all is well. */
void conclude(const char *name, const char *outcome);
void bad_configuration(void);
void bad_msix(void);
