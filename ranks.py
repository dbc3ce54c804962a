"""How the ranks of one target start, and how they find out that one of them is lost.

Knows: torchrun's environment, what must be the same on all ranks, signs of life, signals. Does not
know: what ranks compute (parallel.py). Read next: checkpoint/config.py.

A rank that hangs holds up all others in the middle of a step, in code that no signal interrupts. So
every rank has a thread that leaves signs of life in the store which torchrun keeps, and looks for
those of others.
"""

import atexit
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint.weights import default_target, load_config, resolve, split_inflate
from parallel import ALONE, Group

# Seconds between two signs of life, without one until a rank is lost, and left to print a text.
BEAT_S, LOST_S, ENDS_S = 0.5, 7.0, 4.0
# Another rank may load a large checkpoint from a slow disk; a chat may wait for its user.
FOREVER = timedelta(days=7)
# What a step's numbers hang on.
CODE = ("cache", "kernels", "linear", "model", "parallel", "sampling", "steps")
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankLost(RuntimeError):
    """Another rank failed, ended or does not answer. The message says which."""


class Watch(threading.Thread):
    """Signs of life of all ranks, in the store that torchrun keeps. On rank 0 it watches all the
    others, on them rank 0.
    """

    def __init__(self, store: dist.TCPStore, rank: int, ranks: int):
        super().__init__(daemon=True)
        self.store, self.rank = store, rank
        self.missed = dict.fromkeys([0] if rank else range(1, ranks), 0)  # beats, of each rank
        self.reason, self.told = "", False  # why the run cannot go on; whether the caller knows
        self.ended = threading.Event()
        store.set(f"process {rank}", f"{socket.gethostname()} {os.getpid()}")
        store.set(f"beat {rank}", "")
        if rank == 0 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._raise)  # also torchrun's, when a rank has ended
            signal.signal(signal.SIGINT, self._interrupt)

    def run(self) -> None:
        beat = 0
        last = {}
        while not self.reason:
            if self.ended.wait(BEAT_S):
                return
            beat += 1
            try:
                self.store.set(f"beat {self.rank}", str(beat))
                now = {rank: self.store.get(f"beat {rank}") for rank in self.missed}
                fault = self.store.check(["fault"]) and self.store.get("fault").decode()
            except RuntimeError as error:
                now = {}
                fault = f"the launcher ended ({str(error).splitlines()[0]})"
            for rank in now:
                self.missed[rank] = self.missed[rank] + 1 if now[rank] == last.get(rank) else 0
            last = now
            self.reason = self.reason or fault or self.silent(LOST_S / BEAT_S)
        for rank in self.missed:  # one that is stopped would outlive torchrun's patience
            with suppress(ProcessLookupError, RuntimeError):  # the store may be gone as well
                host, process = self.store.get(f"process {rank}").decode().split()
                if self.missed[rank] > 2 and host == socket.gethostname():
                    os.kill(int(process), signal.SIGKILL)
        if self.rank == 0:
            if not self.told:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            time.sleep(ENDS_S)
            if not self.told:  # the caller is where no signal reaches it
                print(f"error: {self.reason}", file=sys.stderr, flush=True)
        os._exit(1)

    def stop(self) -> None:
        self.ended.set()
        self.join(LOST_S)

    def silent(self, beats: float) -> str:
        """Says which ranks have missed so many beats; "" for none."""
        names = [str(rank) for rank, missed in self.missed.items() if missed >= beats]
        if not names:
            return ""
        return f"rank {' and rank '.join(names)} ended or does not answer: start the run again"

    def lost(self) -> RankLost:
        """What to raise, once it is known who is lost."""
        self.told = True
        for _ in range(4):
            if not self.reason:
                time.sleep(BEAT_S)
        self.reason = self.reason or self.silent(2) or "the launcher ended the run"
        return RankLost(self.reason)

    def why(self, error: BaseException) -> RankLost | None:
        """What to raise instead of an error, if that says that another rank is gone."""
        return self.lost() if of_network(error) else None

    def post(self, error: BaseException) -> None:
        """Let rank 0 know that this rank has failed; not if that is since another one is gone."""
        if not of_network(error):
            said = str(error).splitlines() or [type(error).__name__]
            self.store.set("fault", f"rank {self.rank} failed: {said[0]}")

    def _raise(self, *_) -> None:
        if not self.told:
            raise self.lost()

    def _interrupt(self, *_) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes on what the terminal sent
        raise KeyboardInterrupt


def of_network(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    return any(library in str(error) for library in ("gloo", "NCCL", "TCPStore"))


# ---- what ranks do until rank 0 ends


def serve(group: Group, load, lane) -> None:
    """Run on this rank what rank 0 tells, until that ends, and end likewise. load: the model."""
    interrupted = []
    try:
        model = load()
        signal.signal(signal.SIGINT, lambda *_: interrupted.append(1))  # rank 0 ends the run
        lane.start(follow, group, model).result()
    except Exception as error:
        group.watch.post(error)
        time.sleep(LOST_S)  # rank 0 ends all of them
        os._exit(1)
    group.watch.stop()
    dist.barrier()  # rank 0 may keep the store
    os._exit(130 if interrupted else 0)


def follow(group: Group, model) -> None:
    """The same calls as on rank 0: of the model, once a generation, then of its runner."""
    runner = None
    while said := group.hear():
        name, *args = said
        if name == "set_up":
            runner = model.ready(runner, *args)
        else:
            getattr(runner, name)(*args)


def leave(group: Group) -> None:
    """At the end of rank 0: let the others end as well."""
    if group.lost:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a thread that waits for a lost rank would hold up the end
    group.watch.stop()
    if group.serving:
        group.tell()
        dist.barrier()
    dist.destroy_process_group()


# ---- the start


def own_rank() -> tuple[int, int]:
    """How many ranks there are, and the number of this one, as torchrun says; 1 and 0 without it.

    ValueError for an environment that says it in part.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing and (ranks, rank) != (1, 0):
        raise ValueError(
            f"this process is rank {rank} of {ranks}, but its environment has no "
            f"{', '.join(missing)}: start it with torchrun, or unset RANK and WORLD_SIZE"
        )
    return ranks, rank


def join(
    target: str | None, device: str | None, draft_device: str | None, flags: dict
) -> tuple[Group, str | None, str | None]:
    """The group of this process, once all ranks are there and agree on what they run; the devices
    of target and draft on this rank.

    ValueError, on rank 0: what differs between them, or a shape that they cannot share.
    """
    ranks, rank = own_rank()
    if ranks == 1:
        return ALONE, device, draft_device
    device, draft_device = own_devices(device, draft_device)
    address = os.environ["MASTER_ADDR"]
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    cuda = device.startswith("cuda")
    first, second = (
        dist.TCPStore(address, int(os.environ["MASTER_PORT"]), None, master, FOREVER, False)
        for master in (keeps, False)
    )
    try:
        mine = flags | about(target, ranks)
    except ValueError as error:
        mine = {"error": str(error)}
    first.set(f"about {rank}", json.dumps(mine))
    known = [json.loads(first.get(f"about {r}")) for r in range(ranks)]
    if wrong := disagreement(known):
        if rank == 0:
            raise ValueError(wrong)
        time.sleep(ENDS_S)  # the first to end would be taken for the culprit
        os._exit(2)
    if cuda:
        torch.cuda.set_device(device)
    watch = Watch(second, rank, ranks)
    watch.start()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", first), rank=rank, world_size=ranks, timeout=FOREVER,
    )  # fmt: skip
    group = Group(rank, ranks, watch)
    if rank == 0:
        atexit.register(leave, group)
    return group, device, draft_device


def own_devices(device: str | None, draft_device: str | None) -> tuple[str, str]:
    """Where this rank's part of the target runs, and the draft: the GPU of its number on this
    machine, or its share of the cores. The draft gets the first GPU that no rank has.
    """
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda:"):
        raise ValueError(
            f"device is {device!r} for {ranks} ranks, wanted cuda: each takes the GPU of its number"
        )
    if device == "cuda":
        spare = ranks if torch.cuda.device_count() > ranks else 0
        return f"cuda:{local}", draft_device or f"cuda:{spare}"
    if device == "cpu" and ":" not in (draft_device or "") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[local % len(cores) :: ranks])
    return device, draft_device or device


def about(target: str | None, ranks: int) -> dict[str, str]:
    """What must be the same on all ranks. ValueError for a target that they cannot share."""
    name = target or default_target()
    if split_inflate(name):
        raise ValueError(f"{name} is grown in memory, which several ranks cannot share: use a file")
    config, path, here = load_config(name), resolve(name), Path(__file__).parent
    if ranks > config.num_kv_heads:
        numbers = " or ".join(map(str, range(1, config.num_kv_heads + 1)))
        raise ValueError(
            f"{ranks} ranks cannot share {config.num_kv_heads} key/value heads: each needs "
            f"its own one: start {numbers}"
        )
    files = [path]
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in (".json", ".safetensors")]
    code = [here / f"{module}.py" for module in CODE] + sorted(here.glob("checkpoint/*.py"))
    code += here.glob("few_bits.cpp")
    return {
        "torch": torch.__version__,
        "version of this program": fingerprint(code),
        "checkpoint": fingerprint(files),
    }


def fingerprint(paths: list[Path]) -> str:
    """A hash of the files' sizes and of 64 samples of each."""
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(64):
                file.seek(size * sample // 64)
                found.update(file.read(4096))
    return found.hexdigest()[:12]


def disagreement(known: list[dict]) -> str:
    """What is wrong with what the ranks say of themselves; "" if nothing is."""
    for rank, mine in enumerate(known):
        if "error" in mine:
            return f"rank {rank}: {mine['error']}" if rank else mine["error"]
    for rank, mine in enumerate(known):
        for what, value in mine.items():
            if value != known[0][what]:
                return (
                    f"rank {rank} has {what} {value} and rank 0 {known[0][what]}, wanted the same: "
                    "start all ranks alike"
                )
    return ""
