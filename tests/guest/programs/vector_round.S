# void zmm_round(struct round *), void ymm_round(struct round *): load every vector register, enter the kernel or
# spin or both, and store every vector register. Nothing between touches one.

#define RESULTS 2048
#define MASKS 4096
#define MASK_RESULTS 4160
#define NUMBER 4224
#define ARGUMENTS 4232
#define SPINS 4248

.macro between
    mov %rdi, %r8
    mov NUMBER(%r8), %rax
    test %rax, %rax
    js 1f
    mov ARGUMENTS(%r8), %rdi
    mov ARGUMENTS+8(%r8), %rsi
    syscall
1:  mov SPINS(%r8), %rcx
2:  dec %rcx
    jns 2b
.endm

.text
.global zmm_round
zmm_round:
.irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovdqu64 64*\n(%rdi), %zmm\n
.endr
.irp n,0,1,2,3,4,5,6,7
    kmovq MASKS+8*\n(%rdi), %k\n
.endr
    between
.irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovdqu64 %zmm\n, RESULTS+64*\n(%r8)
.endr
.irp n,0,1,2,3,4,5,6,7
    kmovq %k\n, MASK_RESULTS+8*\n(%r8)
.endr
    vzeroupper
    ret

.global ymm_round
ymm_round:
.irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vmovdqu 64*\n(%rdi), %ymm\n
.endr
    between
.irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vmovdqu %ymm\n, RESULTS+64*\n(%r8)
.endr
    vzeroupper
    ret

.section .note.GNU-stack,"",@progbits
