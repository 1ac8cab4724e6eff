/*
 * From the PVH entry (32-bit protected mode, no paging, EBX = hvm_start_info) to C at CPL 0 in long mode,
 * and from there to CPL 3. Follows Xen's docs/misc/pvh.pandoc and the Intel SDM, volume 3, chapters 3, 6, 7
 * and 10.
 *
 * All tables are data: a CPU whose CPL 0 is interpreted need not build them. The whole of the first 4 GiB is
 * identity-mapped and open to CPL 3; the I/O permission bitmap opens every port to it.
 */
    .set KERNEL_CODE, 0x10
    .set KERNEL_DATA, 0x18
    .set USER_DATA, 0x28 | 3
    .set USER_CODE, 0x30 | 3
    .set TASK, 0x40
    .set IO_BITMAP, 104
    .set TASK_LIMIT, IO_BITMAP + 8192

    .section .note.Xen, "a", @note
    .long 4, 4, 18              /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long pvh_entry

    .text
    .code32
    .global pvh_entry
pvh_entry:
    cld
    mov %ebx, start_info_address
    mov $kernel_stack_end, %esp
    lgdt gdt_pointer
    mov $task_state, %eax       /* the only descriptor with an address in it */
    mov %ax, gdt + TASK + 2
    shr $16, %eax
    mov %al, gdt + TASK + 4
    mov %ah, gdt + TASK + 7
    mov $0x20, %eax             /* CR4.PAE */
    mov %eax, %cr4
    mov $page_map, %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx       /* EFER */
    rdmsr
    or $0x100, %eax             /* LME */
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax        /* PG, PE */
    mov %eax, %cr0
    ljmp $KERNEL_CODE, $long_mode

    .code64
long_mode:
    mov $KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov $TASK, %eax
    ltr %ax
    mov $kernel_stack_end, %rsp
    call kernel_main            /* does not return */
    ud2

/* void enter_user(void (*function)(void)): run it at CPL 3 with interrupts on; never comes back. */
    .global enter_user
enter_user:
    mov $USER_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    push %rax
    mov $user_stack_end - 8, %rax   /* as after a call: 16-byte aligned, plus 8 */
    push %rax
    push $0x202                 /* IF, and the bit that is always set */
    push $USER_CODE
    push %rdi
    iretq

/* The entry of each vector pushes an error code, where the CPU pushed none, and its own number. */
    .global trap_entries
    .balign 16
trap_entries:
    .set vector, 0
    .rept 64
    .balign 16
    .set pushed, vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
    .if !(pushed || vector == 29 || vector == 30)
    push $0
    .endif
    push $vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    push %rax
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    mov %rsp, %rdi
    cld
    call trap
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq

    .data
    .balign 4096
page_map:
    .quad page_directory_pointers + 7
    .fill 511, 8, 0
page_directory_pointers:
    .quad page_directories + 0x0007, page_directories + 0x1007
    .quad page_directories + 0x2007, page_directories + 0x3007
    .fill 508, 8, 0
page_directories:
    .set page, 0
    .rept 2048
    .quad (page << 21) + 0x87   /* 2 MiB, user, writable, present */
    .set page, page + 1
    .endr

    .balign 16
gdt:
    .quad 0, 0
    .quad 0x00AF9B000000FFFF    /* KERNEL_CODE */
    .quad 0x00CF93000000FFFF    /* KERNEL_DATA */
    .quad 0
    .quad 0x00CFF3000000FFFF    /* USER_DATA */
    .quad 0x00AFFB000000FFFF    /* USER_CODE */
    .quad 0
    .quad 0x0000890000000000 + TASK_LIMIT, 0
gdt_pointer:
    .word . - gdt - 1
    .long gdt

    .balign 16
task_state:
    .long 0
    .quad kernel_stack_end      /* RSP0: where interrupts of CPL 3 find their stack */
    .fill 90, 1, 0
    .word IO_BITMAP
    .fill 8192, 1, 0
    .byte 0xFF

    .global start_info_address
start_info_address:
    .long 0

    .bss
    .balign 4096
    .fill 16384, 1, 0
kernel_stack_end:
    .fill 65536, 1, 0
user_stack_end:

    .section .note.GNU-stack, "", @progbits
