/* What firmware boots in these tests, from a disk, from a disc (El Torito, no emulation) or from the network.
 * It reads itself back by INT 13h, checks the sum of it, writes a part to a disk, and says all on the serial port.
 *
 * The table at 8 is genisoimage's -boot-info-table; the tests fill in the same for a disk: where the program
 * begins (in sectors), how long it is, and the sum of its dwords from offset 64 on. All zero: nothing to read.
 */
        .code16
        .text
        .globl  _start

        .set    SERIAL, 0x3F8
        .set    DEBUG_EXIT, 0x501
        .set    CHUNK, 16                       # sectors for a request: 32 KiB on a disc
        .set    BUFFER_SEGMENT, 0x2000          # 64 KiB from 0x20000
        .set    WRITE_LBA, 1024                 # where a disk gets its copy

_start: ljmp    $0, $main
        .org    8
primary_descriptor:     .long 0
first_sector:           .long 0
length:                 .long 0
checksum:               .long 0
        .org    64

main:   xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7C00, %sp
        cld
        sti
        movb    %dl, drive
        cmpb    $0x80, %dl
        jne     second                          # all of us is here
        movw    $0x4200, %ax
        call    transfer                        # the packet is what it begins with: the rest of us
        jnc     second
        jmp     fail

        .balign 4
packet:         .byte 16, 0
packet_count:   .word 3
packet_offset:  .word second
packet_segment: .word 0
packet_lba:     .quad 1
drive:          .byte 0

/* INT 13h, function AX, with the packet. */
transfer:
        movb    drive, %dl
        movw    $packet, %si
        int     $0x13
        ret

fail:   movw    $failed, %si
        call    print
        movb    $1, %al
exit:   movw    $DEBUG_EXIT, %dx
        outb    %al, %dx
1:      hlt
        jmp     1b

/* The text at SI. */
print:  pushw   %ax
1:      lodsb
        testb   %al, %al
        jz      2f
        call    put
        jmp     1b
2:      popw    %ax
        ret

put:    pushw   %dx
        pushw   %ax
        movw    $SERIAL + 5, %dx
1:      inb     %dx, %al
        testb   $0x20, %al
        jz      1b
        popw    %ax
        movw    $SERIAL, %dx
        outb    %al, %dx
        popw    %dx
        ret

failed:         .asciz "\r\ncheck: failed\r\n"
        .org    510
        .word   0xAA55

second: movw    $started, %si
        call    print
        call    find_rsdp
        cmpl    $0, length
        je      done

        movb    $0x48, %ah                      # drive parameters
        movb    drive, %dl
        movw    $parameters, %si
        int     $0x13
        jc      fail
        movw    $sector_size, %si
        call    print
        movzwl  parameters + 24, %eax
        call    print_hex
        movw    $sectors, %si
        call    print
        movl    parameters + 16, %eax
        call    print_hex

        movl    length, %eax
        movzwl  parameters + 24, %ecx
        addl    %ecx, %eax
        decl    %eax
        xorl    %edx, %edx
        divl    %ecx
        movl    %eax, %ebp                      # sectors left
        movl    first_sector, %eax
        movl    %eax, packet_lba
        movw    $0, packet_offset
        movw    $BUFFER_SEGMENT, packet_segment
read:   movl    $CHUNK, %eax
        cmpl    %eax, %ebp
        jae     1f
        movl    %ebp, %eax
1:      movw    %ax, packet_count
        movw    $0x4200, %ax
        call    transfer
        jc      fail
        movzwl  packet_count, %eax
        addl    %eax, packet_lba
        subl    %eax, %ebp
        mulw    parameters + 24                 # bytes read, at most 32 KiB
        shrw    $4, %ax
        addw    %ax, packet_segment
        testl   %ebp, %ebp
        jnz     read

        movl    length, %ecx
        subl    $64, %ecx
        shrl    $2, %ecx
        movw    $BUFFER_SEGMENT + 4, %ax
        movw    %ax, %fs
        xorl    %esi, %esi
        xorl    %eax, %eax
sum:    addl    %fs:(%si), %eax
        addw    $4, %si
        decl    %ecx
        jnz     sum
        cmpl    checksum, %eax
        jne     fail
        movw    $right, %si
        call    print
        call    print_hex

        cmpb    $0x80, drive
        jne     done                            # a disc is not written
        movw    $CHUNK, packet_count
        movl    $WRITE_LBA, packet_lba
        movw    $BUFFER_SEGMENT, packet_segment
        movw    $0x4300, %ax
        call    transfer
        jc      fail
        movw    $written, %si
        call    print

done:   movw    $ended, %si
        call    print
        xorw    %ax, %ax
        jmp     exit
/* Say where the RSDP is: operating systems look for it as we do. */
find_rsdp:
        movw    $0xF000, %bx
1:      movw    %bx, %fs
        cmpl    $0x20445352, %fs:0
        jne     2f
        cmpl    $0x20525450, %fs:4
        je      3f
2:      incw    %bx
        jnz     1b
        ret
3:      movw    $rsdp, %si
        call    print
        movzwl  %bx, %eax
        shll    $4, %eax
        call    print_hex
        movw    $rsdt, %si
        call    print
        movl    %fs:16, %eax
        jmp     print_hex

/* EAX as eight digits. */
print_hex:
        pushal
        movw    $8, %cx
1:      roll    $4, %eax
        pushl   %eax
        andl    $15, %eax
        movb    digits(%eax), %al
        call    put
        popl    %eax
        loop    1b
        popal
        ret

started:        .asciz "\r\ncheck: started"
rsdp:           .asciz "\r\ncheck: RSDP at "
rsdt:           .asciz ", RSDT at "
sector_size:    .asciz "\r\ncheck: sector size "
sectors:        .asciz "\r\ncheck: sectors "
right:          .asciz "\r\ncheck: right sum "
written:        .asciz "\r\ncheck: written"
digits:         .ascii "0123456789abcdef"
ended:          .asciz "\r\ncheck: end\r\n"

        .balign 4
parameters:     .word 30
                .skip 28
