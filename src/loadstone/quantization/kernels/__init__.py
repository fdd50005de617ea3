"""Products and quantisers of our own for x86 CPUs, compiled when first needed; no C compiler is involved.

PyTorch and bitsandbytes have no fast 4-bit product for CPUs without AVX512-BF16 (most laptops), so the few loops
that read every weight are written here as LLVM IR, with llvmlite, and run on torch's own OpenMP threads.
`_llvm.py` builds and compiles; `products.py`, `wide.py`, `quantizers.py` and `attention.py` hold one family of loops
each, `activations.py` and `unpacking.py` what goes before a product, `turning.py` how rows are laid for `wide.py`, and
`replay.py` many calls in one; `cpu.py` is what the rest of the library calls.
"""
