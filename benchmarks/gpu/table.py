"""A run's results as one short table of plain text."""

from __future__ import annotations

from typing import Any

PEERS = ("eager", "compiled")
AGAIN = ", again"
"""After the name of what was measured a second time, beside `compiled`."""


def names_of_ours(rows: list[dict[str, Any]]) -> list[str]:
    """Of our implementations, as measured first."""
    names = dict.fromkeys(name for row in rows for name in row.get("milliseconds", {}))
    return [name for name in names if name not in ("product", *PEERS) and not name.endswith(AGAIN)]


def times_product(row: dict[str, Any], name: str) -> float:
    """A time as a multiple of that of the products.

    That of `compiled`, which has a pass of its own, by way of ours in both: a call that waits for the host takes in one
    pass twice what it takes in another.
    """
    ms = row["milliseconds"]
    if name != "compiled":
        return float(ms[name] / ms["product"])
    for via in (*names_of_ours([row]), "product"):
        if via + AGAIN in ms and via in ms:
            return float(ms[name] / ms[via + AGAIN] * ms[via] / ms["product"])
    return float(ms[name] / ms["product"])


def table(content: dict[str, Any]) -> str:
    """Stages, then rows: the product's time, what the ceilings allow, and each other's time as multiples of it."""
    versions = content.get("versions", {})
    lines = ["", f"{content.get('device', '?')}, torch {versions.get('torch')}, triton {versions.get('triton')}"]
    for stage in content["stages"]:
        lines.append(
            f"{stage['name']:<12} {stage['status']:<12} {stage.get('seconds', 0):>6.1f} s  {stage.get('detail', '')}"
        )
    if "seconds" in content:
        lines.append(f"{'all':<25} {content['seconds']:>6.1f} s")
    rows = content["rows"]
    columns = [*names_of_ours(rows), *PEERS]
    lines += ["", f"{'row':<62} {'floor ms':>9} {'product':>9}" + "".join(f" {name[:10]:>10}" for name in columns)]
    for row in rows:
        lines.append(_row(row, columns, content.get("ceilings", {})))
    return "\n".join(lines)


def floor(row: dict[str, Any], ceilings: dict[str, float]) -> float | None:
    """Milliseconds that no implementation can go below: its operations, or its bytes, at the device's best."""
    if not ceilings or "operations" not in row:
        return None
    operations = row["operations"] / ceilings["bfloat16_operations_per_second"]
    return 1e3 * max(operations, row["bytes"] / ceilings["copy_bytes_per_second"])


def _row(row: dict[str, Any], columns: list[str], ceilings: dict[str, float]) -> str:
    name = f"{row.get('row', '?'):<62}"
    if "batches" in row:
        return f"{name} {', '.join(sizes_of(row))}"
    ms = row.get("milliseconds", {})
    least = floor(row, ceilings)
    cells = [f"{least:>9.3f}" if least is not None else f"{'-':>9}"]
    cells.append(f"{ms['product']:>9.3f}" if "product" in ms else f"{'-':>9}")
    for column in columns:
        if column in ms and "product" in ms:
            off = row.get("difference", {}).get(column, 0.0)
            mark = "!" if off is None or off > 0.02 else ""  # far from what eager gives, or the row's judge
            cells.append(f"{f'x {times_product(row, column):.2f}{mark}':>10}")
        else:
            cells.append(f"{row.get('failed', {}).get(column, row.get('failed', {}).get('all', '-'))[:10]:>10}")
    return f"{name} {' '.join(cells)}"


def sizes_of(row: dict[str, Any]) -> list[str]:
    """The largest batches, and how long a step took."""
    seconds = row.get("step_seconds", {})
    return [
        f"{who} {n:,}" + (f" ({seconds[who]:.2f} s)" if who in seconds else "") for who, n in row["batches"].items()
    ]
