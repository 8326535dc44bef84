"""Run `cover` over many model types, each in a process of its own, with a time limit and a record to resume from."""

import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

from was_fx.coverage.cover import Coverage, cover
from was_fx.schedules.progress import Progress, report
from was_fx.version import __version__

METHOD = "forkserver" if sys.platform != "win32" else "spawn"
# What every type needs; a new process that imports them itself takes a third longer.
_PRELOADED = [
    "was_fx.coverage.cover",
    "torch._inductor.compile_fx",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
]


def sweep(
    model_types: Sequence[str],
    *,
    timeout: float = 180.0,
    graphs: bool = True,
    record: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[Coverage]:
    """Cover each model type in turn; one that crashes or hangs does not stop the others.

    Args:
        model_types: types of transformers' configurations.
        timeout: seconds for one type.
        graphs: as for `cover`.
        record: a file of JSON Lines. What it holds for the same versions of torch, transformers and was-fx is given
            back and not tried again; each new result is added to it at once.
        progress: called with (types done, all types).

    Yields:
        One `Coverage` per type, in order.
    """
    known = _read(record)
    for done, model_type in enumerate(model_types):
        report(progress, done, len(model_types))
        result = known.get(model_type)
        if result is None:
            result = _isolated(model_type, timeout, graphs)
            _add(record, result)
        yield result
    report(progress, len(model_types), len(model_types))


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    import torch
    import transformers

    return {"was-fx": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _isolated(model_type: str, timeout: float, graphs: bool) -> Coverage:
    """`cover` in a new process, which starts from one that has torch and transformers in memory already."""
    context: Any = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(model_type, graphs, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return Coverage(model_type, "", error=f"not done after {timeout:g} s")
        return receiver.recv()
    except EOFError:
        process.join()
        return Coverage(model_type, "", error=f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send(model_type: str, graphs: bool, sender: Connection) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)  # tiny products lose by threads
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    sender.send(cover(model_type, graphs=graphs))


def _read(record: Path | None) -> dict[str, Coverage]:
    """Results of a record by model type; a last line that a kill cut short is left out."""
    found: dict[str, Coverage] = {}
    if record is None or not record.exists():
        return found
    here = versions()
    for line in record.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            if entry.pop("versions") == here:
                entry |= {name: tuple(entry[name]) for name in ("experts", "by_model", "graph_breaks")}
                found[entry["model_type"]] = Coverage(**entry)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _add(record: Path | None, result: Coverage) -> None:
    if record is None:
        return
    line = json.dumps({"versions": versions(), **dataclasses.asdict(result)}, ensure_ascii=False)
    with record.open("a+b") as file:
        if file.tell() and not _ends_line(file):
            file.write(b"\n")  # a kill cut the last line short
        file.write(line.encode() + b"\n")


def _ends_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
