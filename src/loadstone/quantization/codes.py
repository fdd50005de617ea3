"""The sixteen values of NF4: quantiles of a normal distribution in [-1, 1] (QLoRA, Dettmers et al. 2023)."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
ZERO_STEPS = 16  # parts of a code that int4's zero points are whole numbers of
# How much of a block's range, below and above zero, int4's sixteen numbers are spread over: what lies outside is cut
# off, so that the rest is rounded less.
RANGES = tuple((below, above) for below in (1.0, 0.95, 0.9) for above in (1.0, 0.95, 0.9))
LANES = 16  # rows that stand side by side where codes are turned


def padded(rows: int) -> int:
    """Return how many rows there are with those that fill the last sixteen."""
    return -(-rows // LANES) * LANES
