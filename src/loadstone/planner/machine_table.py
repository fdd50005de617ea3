"""Machines by name: public figures of memory, its rate, and 16-bit arithmetic, each with where it is published.

`tflops` are dense products in float16 that are summed in float32, without sparsity; None where the maker tells none.
Cards with error correction (datacenter ones) show a little less memory than they have, so theirs is in GB and that of
the others in GiB. "typical" machines stand for many: their rate is that of their kind of memory, two channels wide.
"""

from __future__ import annotations

GB, GIB = 10**9, 2**30

_AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_BLACKWELL = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_GEFORCE = "https://www.nvidia.com/en-us/geforce/graphics-cards"
_DATACENTER = "https://www.nvidia.com/en-us/data-center"
_APPLE = "https://www.apple.com/newsroom"
_M3 = f"{_APPLE}/2023/10/apple-unveils-m3-m3-pro-and-m3-max/"
_M4 = f"{_APPLE}/2024/10/apple-introduces-m4-pro-and-m4-max/"
_JEDEC = "https://www.jedec.org/standards-documents/docs"

# name: (what it is, memory in bytes, its rate in GB/s, TFLOPS, published at)
CARDS: dict[str, tuple[str, int, float, float | None, str]] = {
    "rtx-3060-12gb": ("GeForce RTX 3060 12 GB", 12 * GIB, 360, 25.5, f"{_GEFORCE}/30-series/rtx-3060-3060ti/"),
    "rtx-3070-8gb": ("GeForce RTX 3070", 8 * GIB, 448, 40.6, _AMPERE),
    "rtx-3080-10gb": ("GeForce RTX 3080 10 GB", 10 * GIB, 760, 59.5, _AMPERE),
    "rtx-3090-24gb": ("GeForce RTX 3090", 24 * GIB, 936, 71, _AMPERE),
    "rtx-4060-8gb": ("GeForce RTX 4060", 8 * GIB, 272, 30.2, f"{_GEFORCE}/40-series/rtx-4060-4060ti/"),
    "rtx-4060ti-16gb": ("GeForce RTX 4060 Ti 16 GB", 16 * GIB, 288, 44.1, f"{_GEFORCE}/40-series/rtx-4060-4060ti/"),
    "rtx-4070-12gb": ("GeForce RTX 4070", 12 * GIB, 504, 58.3, f"{_GEFORCE}/40-series/rtx-4070-family/"),
    "rtx-4080-16gb": ("GeForce RTX 4080", 16 * GIB, 717, 97.5, _ADA),
    "rtx-4090-24gb": ("GeForce RTX 4090", 24 * GIB, 1008, 165.2, _ADA),
    "rtx-5070-12gb": ("GeForce RTX 5070", 12 * GIB, 672, None, f"{_GEFORCE}/50-series/rtx-5070-family/"),
    "rtx-5080-16gb": ("GeForce RTX 5080", 16 * GIB, 960, 112.6, _BLACKWELL),
    "rtx-5090-32gb": ("GeForce RTX 5090", 32 * GIB, 1792, 209.5, _BLACKWELL),
    "a6000-48gb": ("RTX A6000", 48 * GB, 768, 154.8, _AMPERE),
    "t4-16gb": ("Tesla T4", 16 * GB, 320, 65, f"{_DATACENTER}/tesla-t4/"),
    "v100-16gb": ("Tesla V100", 16 * GB, 900, 125, f"{_DATACENTER}/v100/"),
    "a10-24gb": ("A10", 24 * GB, 600, 125, f"{_DATACENTER}/products/a10-gpu/"),
    "l4-24gb": ("L4", 24 * GB, 300, 121, f"{_DATACENTER}/l4/"),
    "l40s-48gb": ("L40S", 48 * GB, 864, 362, f"{_DATACENTER}/l40s/"),
    "a100-40gb": ("A100 40 GB", 40 * GB, 1555, 312, f"{_DATACENTER}/a100/"),
    "a100-80gb": ("A100 80 GB PCIe", 80 * GB, 1935, 312, f"{_DATACENTER}/a100/"),
    "h100-80gb": ("H100 SXM", 80 * GB, 3350, 989, f"{_DATACENTER}/h100/"),
    "h200-141gb": ("H200 SXM", 141 * GB, 4800, 989, f"{_DATACENTER}/h200/"),
}

# name: (what it is, memory in bytes, its rate in GB/s, published at)
MACS: dict[str, tuple[str, int, float, str]] = {
    "m1-8gb": ("Mac with M1, 8 GB", 8 * GIB, 68, f"{_JEDEC}/jesd209-4d (LPDDR4X-4266, 128 bits)"),
    "m1-16gb": ("Mac with M1, 16 GB", 16 * GIB, 68, f"{_JEDEC}/jesd209-4d (LPDDR4X-4266, 128 bits)"),
    "m2-8gb": ("Mac with M2, 8 GB", 8 * GIB, 100, f"{_APPLE}/2022/06/apple-unveils-m2/"),
    "m2-16gb": ("Mac with M2, 16 GB", 16 * GIB, 100, f"{_APPLE}/2022/06/apple-unveils-m2/"),
    "m3-16gb": ("Mac with M3, 16 GB", 16 * GIB, 100, _M3),
    "m3-max-64gb": ("Mac with M3 Max, 64 GB", 64 * GIB, 400, _M3),
    "m4-16gb": ("Mac with M4, 16 GB", 16 * GIB, 120, f"{_APPLE}/2024/05/apple-introduces-m4-chip/"),
    "m4-pro-48gb": ("Mac with M4 Pro, 48 GB", 48 * GIB, 273, _M4),
    "m4-max-128gb": (
        "Mac with M4 Max, 128 GB",
        128 * GIB,
        546,
        _M4,
    ),
    "m2-ultra-192gb": ("Mac with M2 Ultra, 192 GB", 192 * GIB, 800, f"{_APPLE}/2023/06/apple-introduces-m2-ultra/"),
}

# name: (what it is, memory in bytes, its rate in GB/s, cores, published at)
TYPICAL: dict[str, tuple[str, int, float, int, str]] = {
    "laptop-8gb": ("typical laptop, 8 GB DDR4-3200", 8 * GIB, 51.2, 4, f"{_JEDEC}/jesd79-4a"),
    "laptop-16gb": ("typical laptop, 16 GB DDR4-3200", 16 * GIB, 51.2, 4, f"{_JEDEC}/jesd79-4a"),
    "laptop-32gb": ("typical laptop, 32 GB DDR5-5600", 32 * GIB, 89.6, 6, f"{_JEDEC}/jesd79-5c"),
    "desktop-16gb": ("typical desktop, 16 GB DDR4-3200", 16 * GIB, 51.2, 6, f"{_JEDEC}/jesd79-4a"),
    "desktop-32gb": ("typical desktop, 32 GB DDR5-5600", 32 * GIB, 89.6, 8, f"{_JEDEC}/jesd79-5c"),
    "desktop-64gb": ("typical desktop, 64 GB DDR5-5600", 64 * GIB, 89.6, 8, f"{_JEDEC}/jesd79-5c"),
}
