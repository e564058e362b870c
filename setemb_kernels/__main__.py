"""``python -m setemb_kernels``: which implementation serves which op on which device, and why the others are absent."""

from __future__ import annotations

import torch

from setemb_kernels import __version__, backends, build_info


def main() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"setemb_kernels {__version__}, torch {torch.__version__}, cpu {capability}, {torch.get_num_threads()} threads"
    )
    rows = [
        ("op", "device", "served by", "because"),
        *((b.op, b.device, b.implementation, b.reason) for b in backends()),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip())
    for key, value in (build_info() or {}).items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
