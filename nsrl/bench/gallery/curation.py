"""Making the gallery: figures in processes of one thread, taken up where it was interrupted, and the page."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from nsrl.bench.engine import open_workers
from nsrl.bench.gallery.page import WHOLE, write_page
from nsrl.bench.gallery.registry import FIGURES
from nsrl.errors import NsrlError
from nsrl.files import written_atomically
from nsrl.reading.documents import read_results


def make_gallery(
    out: str | Path,
    *,
    only: Sequence[str] = (),
    workers: int = 2,
    again: bool = False,
    quick: bool = False,
    on_progress: Callable[[str, int, int], Any] | None = None,
) -> list[Path]:
    """Draw the figures as PNG, with a JSON of numbers beside each and a page (README.md) that shows them all.

    What is there already is left alone, so an interrupted gallery goes on where it stopped. Drawing all at once also
    writes the time that it took, gallery.json.

    Args:
        out: the folder.
        only: names of `FIGURES`; default all.
        workers: processes at a time, one thread each; 0 draws in this process.
        again: draw also what is there.
        quick: small sizes, to try it out; the numbers mean nothing.
        on_progress: called with (name just finished, figures done, figures altogether).

    Returns:
        The PNGs, in the order of the page.

    Raises:
        NsrlError: unknown names, figures that failed (the others are drawn), or a folder that cannot be written.
    """
    unknown = [name for name in only if name not in FIGURES]
    if unknown:
        raise NsrlError(f"there is no figure {', '.join(unknown)}; known: {', '.join(FIGURES)}")
    if workers < 0:
        raise NsrlError(f"workers must be 0 or more processes, not {workers}")
    out = Path(out)
    names = [name for name in FIGURES if not only or name in only]
    waiting = [name for name in names if again or not _finished(out, name, quick)]
    done, start = len(names) - len(waiting), perf_counter()
    failed: dict[str, str] = {}

    def finish(name: str, error: BaseException | None) -> None:
        nonlocal done
        done += 1
        if error is not None:
            failed[name] = f"{type(error).__name__}: {error}"
        if on_progress is not None:
            on_progress(name, done, len(names))

    if workers == 0:
        for name in waiting:
            try:
                draw(name, out, quick)
            except Exception as error:  # whatever it is, the other figures do not depend on it
                finish(name, error)
            else:
                finish(name, None)
    elif waiting:
        _draw_in_processes(waiting, out, quick, workers, finish)
    if len(waiting) == len(FIGURES) and not failed:
        _write(
            out / WHOLE,
            {
                "figures": len(FIGURES),
                "seconds": round(perf_counter() - start, 1),
                "quick": quick,
                "workers": max(workers, 1),
                "cores": os.cpu_count(),
                "command": "nsrl ntk gallery --again",
                "torch": version("torch"),
                "python": platform.python_version(),
            },
        )
    write_page(out)
    if failed:
        raise NsrlError("; ".join(f"the figure {name} failed ({reason})" for name, reason in failed.items()))
    return [out / f"{name}.png" for name in names]


def draw(name: str, out: Path, quick: bool) -> None:
    """Draw one figure and write its two files, the JSON last."""
    import torch

    torch.manual_seed(0)
    start = perf_counter()
    plate = FIGURES[name].draw(name, quick)
    plate.save(out / f"{name}.png")
    content = {
        "figure": name,
        "quick": quick,
        "numbers": plate.numbers,
        "seconds": round(perf_counter() - start, 1),
        "command": f"nsrl ntk gallery --only {name}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    _write(out / f"{name}.json", content)


def _write(path: Path, content: dict[str, Any]) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _draw_in_processes(
    names: list[str], out: Path, quick: bool, workers: int, finish: Callable[[str, BaseException | None], None]
) -> None:
    # Children read the number of threads when they import torch, which a forked one would have done already.
    os.environ["OMP_NUM_THREADS"] = "1"
    # The agent is trained once a process: its figures follow one another in one.
    agents = [name for name in names if FIGURES[name].room == "policies"]
    tasks = [agents, *([name] for name in names if name not in agents)] if agents else [[name] for name in names]
    with open_workers("local", min(workers, len(tasks)), out) as pool:
        pending: dict[Future[None], list[str]] = {pool.submit(_draw_all, t, out, quick): t for t in tasks}
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                for name in pending.pop(future):
                    # one figure of several may have failed behind others that are there
                    drawn = _finished(out, name, quick)
                    finish(name, None if drawn else future.exception() or RuntimeError("not drawn"))


def _draw_all(names: list[str], out: Path, quick: bool) -> None:
    for name in names:
        draw(name, out, quick)


def _finished(out: Path, name: str, quick: bool) -> bool:
    try:
        content = read_results(out / f"{name}.json")
    except (OSError, ValueError):
        return False
    return content.get("quick") == quick and (out / f"{name}.png").is_file()
