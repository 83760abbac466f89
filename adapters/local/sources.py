"""Where are a model's files? In this installation, in a folder, or on the hub."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download
from tqdm import tqdm  # type: ignore[import-untyped]

from adapters.local.frames import Loading
from adapters.local.options import Options

DEMO = Path(__file__).parent / "demo" / "model"
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
UNWANTED = ["*/*", "consolidated*"]
"""The same weights once more, in other layouts."""

SAMPLES, SAMPLE_BYTES = 64, 64 * 1024
"""What is looked at of a large file: to read weights whole would take as long as to load them."""

Report = Callable[[Loading], None]


class CannotLoad(Exception):
    """The message is for the person who starts the gateway."""


def find(options: Options, report: Report) -> Path:
    """The folder of the model, downloaded if need be. Raises CannotLoad."""
    if options.model == "demo":
        if not DEMO.is_dir():
            raise CannotLoad("this installation comes without the demo model; set `model` to a folder or a hub id")
        return DEMO
    if not options.is_path:
        return _download(options.model, options.revision, report)
    folder = Path(options.model).expanduser()
    if not folder.is_dir():
        raise CannotLoad(f"there is no folder {options.model}")
    return folder


def revision_of(folder: Path) -> str:
    """Of a model's files: another one where any of them is another, the same on every machine."""
    seen = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not any(path.match(pattern) for pattern in WANTED):
            continue
        size = path.stat().st_size
        seen.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            step = max(SAMPLE_BYTES, -(-size // SAMPLES))
            for start in range(0, size, step):
                file.seek(start)
                seen.update(file.read(SAMPLE_BYTES))
    return seen.hexdigest()


def _download(model: str, revision: str | None, report: Report) -> Path:
    def fetch(*, dry_run: bool, bar: type[tqdm] = _Bar) -> Any:
        return snapshot_download(
            model,
            revision=revision,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            local_files_only=constants.HF_HUB_OFFLINE,
            tqdm_class=bar,
            dry_run=dry_run,
        )

    try:
        with suppress(errors.DryRunError):  # without a network; the files may be here all the same
            missing = sum(file.file_size or 0 for file in fetch(dry_run=True) if file.will_download)
            return Path(fetch(dry_run=False, bar=_reporting(report, missing)))
        return Path(fetch(dry_run=False))
    except errors.GatedRepoError:
        raise CannotLoad(f"{model} is gated: accept its licence on the hub, and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise CannotLoad(f"{model} has no revision '{revision}'") from None
    except errors.RepositoryNotFoundError:
        raise CannotLoad(f"there is no model {model} on the hub, or it is private and HF_TOKEN is not set") from None
    except errors.HFValidationError:
        raise CannotLoad(f"'{model}' is neither a folder nor a model id like ORG/NAME") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise CannotLoad(
            f"cannot download {model}: no network; download it once where there is one (`hf download {model}`), copy "
            f"the folder here and start with `suiron serve --model ./{model.rpartition('/')[2]}`"
        ) from None
    except Exception as exc:  # the hub's answers, the disk, and what the hub's HTTP client raises
        raise CannotLoad(f"cannot download {model}: {first_line(exc)}") from None


def _reporting(report: Report, total_bytes: int) -> type[tqdm]:
    """A class of progress bars, as the hub's client wants it; its own totals grow while it finds files."""

    class Reporting(_Bar):
        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B" and total_bytes:
                report(Loading("download", min(1.0, self.n / total_bytes)))
            return shown

    return Reporting


class _Bar(tqdm):  # type: ignore[misc]
    """Counts, and prints nothing."""

    def __init__(self, *args: Any, name: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})


class _Nowhere:
    def write(self, _: str) -> None: ...

    def flush(self) -> None: ...


def first_line(exc: Exception) -> str:
    """The first line of what was said, short enough to read."""
    said = str(exc).strip().splitlines()
    return said[0][:300] if said else type(exc).__name__
