"""Grouped products in LLVM IR; imported only where they are compiled, as llvmlite is an extra."""
