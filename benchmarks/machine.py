"""What a figure was measured on: the processor, its cores, and how fast it multiplies.

    python benchmarks/machine.py

Every benchmark here prints this line first. Processors differ twentyfold in bfloat16, so a figure without it says
little, and only figures of one machine and one run can be compared."""
import argparse, os, platform, time

def processor():
    "Its name, if the system tells."
    try: lines = open("/proc/cpuinfo", encoding="utf-8").read().splitlines()
    except OSError: lines = []
    return next((l.split(":")[1].strip() for l in lines if l.startswith("model name")), platform.processor())

def product_rate(dtype, size=512, times=5):
    "Operations per second of a product of two square matrices of a torch type: the best of some."
    import torch
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter(); a @ b; best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best

def about():
    "One line."
    import torch
    rates = (f"{product_rate(t) / 1e9:,.0f} GFLOP/s in {str(t).removeprefix('torch.')}" for t in
             (torch.float32, torch.bfloat16))
    return (f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; products: "
            f"{', '.join(rates)}")

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(about())
