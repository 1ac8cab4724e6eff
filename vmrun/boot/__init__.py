"""What a guest finds at its first instruction: kernel, initramfs, boot parameters, MP and ACPI tables. VMM
process.
"""
