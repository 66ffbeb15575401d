"""The report of a run as Markdown, and where its files lie."""

import re
from pathlib import Path
from typing import Any

from .plan import NAMES, WHOLE_NAMES
from .verdicts import mean, verdicts, word

Report = dict[str, Any]


def slug(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" as part of a file's name: "h100_80gb_hbm3"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower().replace("nvidia", "")).strip("_") or "device"


def paths(out: Path, device: str, whole: bool = False) -> tuple[Path, Path, Path]:
    """(JSON, Markdown, picture): in the folder ``out``, or beside the JSON file that it names. whole: those of --train."""
    usual = f"gpu_{slug(device)}" + ("_train" if whole else "")
    folder, stem = (out.parent, out.stem) if out.suffix == ".json" else (out, usual)
    return folder / f"{stem}.json", folder / f"{stem}.md", folder / f"{stem}.png"


def table(head: tuple[str, ...], rows: list[list[str]], words: int = 1) -> list[str]:
    """A Markdown table whose first ``words`` columns are words and whose others are numbers."""
    rule = "|" + "---|" * words + "---:|" * (len(head) - words)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def promised(report: Report) -> list[str]:
    """The promises and what became of them."""
    return table(("promise", "found", ""), [[v["line"], v["found"], word(v["met"])] for v in verdicts(report)], words=3)


def sections(report: Report) -> list[str]:
    """How each section ended."""

    def said(part: Report) -> str:
        good = "ok" if part.get("ok") else "FAILED" if part.get("ok") is False else "–"
        rest = [part.get(k) for k in ("error", "skipped", "stopped")]
        missed = len(part.get("not_reached", ()))
        return "; ".join([good, *(str(r) for r in rest if r), *([f"{missed} cases not reached"] if missed else [])])

    return table(
        ("section", "seconds", "result"),
        [[n, f"{report[n].get('took_s', 0):.1f}", said(report[n])] for n in (*NAMES, *WHOLE_NAMES) if n in report],
        3,
    )


def speeds(rows: list[Report]) -> list[str]:
    """One line for each case that was timed."""
    head = ("kernel", "case", "size", "µs", "GB/s", "of a copy", "TFLOP/s", "to eager", "to compiled", "to TF32")

    def ratio(r: Report, key: str) -> str:
        return f"{r[key] / r['seconds']['alphabar']:.2f}" if r.get(key) else "–"

    def cells(r: Report) -> list[str]:
        rates = [f"{r['seconds']['alphabar'] * 1e6:.1f}", f"{r['bytes_per_s'] / 1e9:.0f}", f"{r['share_of_copy']:.0%}"]
        rates.append(f"{r['flops_per_s'] / 1e12:.2f}")
        return [r["kernel"], r["case"], r["size"], *rates, *(ratio(r, k) for k in ("eager_s", "compiled_s", "tf32_s"))]

    return table(head, [cells(r) for r in rows if "seconds" in r], words=3)


def summary(rows: list[Report]) -> list[str]:
    """One line for each kernel: the geometric means of its ratios, and the range of its shares of a copy at 256 MiB."""
    head = ("kernel", "cases", "of a copy, large", "to eager", "to compiled", "slowest to compiled")

    def cells(name: str) -> list[str]:
        own = [r for r in rows if r["kernel"] == name and "seconds" in r]
        shares = [r["share_of_copy"] for r in own if r["size"] != "small"]
        eager, compiled = ([r[k] / r["seconds"]["alphabar"] for r in own if r.get(k)] for k in ("eager_s", "compiled_s"))
        span = f"{min(shares):.0%} to {max(shares):.0%}" if shares else "–"
        ratios = [f"{f(v):.2f}" if v else "–" for f, v in ((mean, eager), (mean, compiled), (min, compiled))]
        return [name, str(len(own)), span, *ratios]

    return table(head, [cells(n) for n in dict.fromkeys(r["kernel"] for r in rows)])


def resources(rows: list[Report]) -> list[str]:
    """What the driver says of the kernels that ran."""
    head = ("kernel", "registers", "budget", "local bytes", "threads", "dynamic bytes", "warps on a multiprocessor")
    keys = ("kernel", "registers", "budget", "local_bytes", "threads", "dynamic_bytes", "warps")
    return table(head, [[str(r[k]) for k in keys] for r in rows])


def whole_steps(rows: list[Report]) -> list[str]:
    """One line for each whole step that was timed."""
    head = ("precision", "batch", "alphabar, ms", "eager, ms", "compiled, ms", "to eager", "to compiled", "images a second")

    def cells(r: Report) -> list[str]:
        seconds = r["seconds"]
        own = seconds["alphabar"]
        others = [seconds.get(k) for k in ("eager", "compiled")]
        times = [f"{own * 1e3:.2f}", *(f"{s * 1e3:.2f}" if s else "–" for s in others)]
        return [
            r["precision"],
            str(r["batch"]),
            *times,
            *(f"{s / own:.2f}" if s else "–" for s in others),
            f"{r['batch'] / own:,.0f}",
        ]

    return table(head, [cells(r) for r in rows if "seconds" in r], words=1)


def trainings(part: Report) -> list[str]:
    """One line for each run of the public program."""
    head = ("run", "seconds", "loss at the end", "mean loss apart from the CPU's", "allowed", "")
    cells = [
        [
            r["run"],
            f"{r['seconds']:.1f}" if "seconds" in r else "–",
            f"{r['last']['loss']:.4f}" if "last" in r else "–",
            *(f"{r[k]:.1e}" if k in r else "–" for k in ("apart", "limit")),
            "ok" if r["ok"] else "FAILED" if r["ok"] is False else r.get("skipped", "–"),
        ]
        for r in part["rows"]
    ]
    sheets = [f"![{r['run']}]({r['sheet']})" for r in part["rows"] if "sheet" in r]
    return [*table(head, cells), *(line for sheet in sheets for line in ("", sheet))]


WHOLE_CONDITIONS = """\
The U-Net of DDPM for 32×32×3: 35.7 million parameters, 128, 256, 256, 256 channels, attention at 16×16. A training step draws t
and the noise and makes forward pass, loss, backward pass, clipping, AdamW and the running average. CUDA events around some steps,
contestants in turn, medians. PyTorch: channels last; bf16 by autocast in training, by cast weights in sampling; fused AdamW;
compiled by torch.compile(mode="max-autotune"). "To eager", "to compiled": PyTorch's time over ours.""".splitlines()


CONDITIONS = """\
float32. CUDA events around each call, the L2 cache overwritten before it, contestants in turn within a case, medians. GB/s counts
each operand once; a copy of 256 MiB, timed in turn with every case, is the yardstick (bytes read and written). "To eager", "to
compiled": PyTorch's time over ours, above 1 we are faster; of images the faster of PyTorch's memory formats; TF32 off, but in the
last column. Size: "chief" and "large" are cases of 256 MiB where memory is the limit, "small" the registry's own.""".splitlines()


def markdown(report: Report, picture: str | None, command: str) -> str:
    """The whole report."""
    env = report["environment"]
    versions = ", ".join(f"{k} {env[k]}" for k in ("cupy", "numpy", "torch", "triton", "python") if env.get(k))
    text = [
        f"# alphabar on {env['device']}, {env['date'][:10]}",
        "",
        f"{env['multiprocessors']} multiprocessors, {env['memory_bytes'] / 2**30:.0f} GiB, driver {env['driver']},"
        f" NVRTC {env['nvrtc']}; {versions}. Commit {env['commit']}. Made by `{command}`.",
        *("", "## Promises", "", *promised(report), "", "## Sections", "", *sections(report)),
    ]
    speed = report.get("speed", {})
    rows = speed.get("rows", [])
    if rows:
        found = speed.get("limits", {})
        product = found.get("product_flops_per_s")
        words = f"Copy: {found.get('copy_bytes_per_s', 0) / 1e9:.0f} GB/s" + (
            f"; product in float32: {product / 1e12:.1f} TFLOP/s." if product else "."
        )
        text += ["", "## Speed", "", *CONDITIONS, words, "", *summary(rows)]
        text += ["", f"![Roofline]({picture})"] if picture else []
        text += ["", "## Every case", "", *speeds(rows)]
    titles = {"steps": "Training steps", "trajectories": "Trajectories of 50 DDIM steps"}
    timed = {name: found for name in titles if (found := report.get(name, {}).get("rows"))}
    if timed:
        text += ["", *WHOLE_CONDITIONS, *(("", f"![Growth with the batch]({picture})") if picture else ())]
        for name, own in timed.items():
            text += ["", f"## {titles[name]}", "", *whole_steps(own)]
    if report.get("runs", {}).get("rows"):
        text += ["", "## Trainings by the public program", "", *trainings(report["runs"])]
    if checks := report.get("networks", {}).get("rows"):
        cells = [
            [r["check"], *(f"{r[k]:.1e}" if k in r else "–" for k in ("error", "limit")), "ok" if r["ok"] else "FAILED"]
            for r in checks
        ]
        text += ["", "## Beside the CPU", "", *table(("check", "error", "allowed", ""), cells)]
    if found := report.get("kernels", {}).get("resources"):
        text += ["", "## Resources", "", *resources(found)]
    return "\n".join(text) + "\n"
