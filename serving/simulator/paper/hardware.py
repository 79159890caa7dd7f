"""What needs no trace: the break-even bandwidth of reuse (FAST'25, section 2.2) and the latencies of Figure 14."""

from papers.comparison import PaperTable, compare
from serving.simulator.performance import mooncake_a800

# Prompt tokens: prefill without and with 95 % cached, KV transfer, loading the cache; seconds.
FIGURE_14 = {
    8192: (1.002, 0.135, 0.030, 0.029),
    16384: (2.056, 0.226, 0.061, 0.055),
    32768: (4.480, 0.407, 0.124, 0.108),
    65536: (10.587, 0.881, 0.249, 0.213),
    131072: (27.512, 2.328, 0.494, 0.420),
}


def break_even_bandwidth(tokens: int, flops: float) -> float:
    """Bytes per second from which reusing a prefix beats computing it, for the paper's LLaMA3-70B:
    G * 2 d s / (gqa (a p d + b d^2)) with d = 8192, s = 2 bytes, gqa = 8, a = 4, b = 22.
    """
    width = 8192
    return flops * 2 * width * 2 / (8 * (4 * tokens * width + 22 * width**2))


def break_even() -> PaperTable:
    rows = [
        compare(
            "8 x A800, GB/s", 6.0, break_even_bandwidth(8192, 8 * 312e12) / 1e9, 0.05, note="prefix of 8,192 tokens"
        ),
        compare(
            "8 x H800, GB/s", 19.0, break_even_bandwidth(8192, 8 * 989e12) / 1e9, 0.05, note="prefix of 8,192 tokens"
        ),
    ]
    return PaperTable("Bandwidth from which reuse pays", tuple(rows))


def figure_14() -> PaperTable:
    performance = mooncake_a800()
    rows = []
    for tokens, (cold_s, warm_s, transfer_s, load_s) in FIGURE_14.items():
        reused = int(tokens * 0.95)
        costs, size = performance.costs, f"{tokens // 1024}k"
        fitted = "in sample: the coefficients were fitted to these points"
        rows += [
            compare(f"prefill {size}, s", cold_s, costs.prefill_s(tokens, 0), 0.045, note=fitted),
            compare(f"prefill {size}, 95 % cached, s", warm_s, costs.prefill_s(tokens, reused), 0.045, note=fitted),
            compare(f"transfer {size}, s", transfer_s, costs.transfer_s(tokens), 0.05),
            compare(f"load cache {size}, s", load_s, performance.load_token * reused, 0.15),
        ]
    return PaperTable("Figure 14: latency of one request", tuple(rows))
