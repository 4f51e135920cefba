"""Table 1 in profile smoke on a real Slurm of one machine, with a cancelled job and a daemon that dies: `make test-slurm`.

Needs root, and Debian's slurm-wlm and munge, which it installs where apt-get can. Ends with 0 if the table is complete and equal
to the one that is computed in this process, and with 0 and a reason where Slurm cannot be had.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path("/etc/slurm/slurm.conf")
CONF = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=15
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def say(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def run(*command: str, check: bool = True) -> str:
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout.strip()


def installed() -> str:
    "Why Slurm cannot be had; nothing if it can."
    if os.geteuid(): return "not root"
    if PLACE.exists(): return f"this machine has a Slurm of its own ({PLACE})"
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        if not shutil.which("apt-get"): return "no slurm, and no apt-get to install it with"
        subprocess.run(["apt-get", "update"], capture_output=True)
        done = subprocess.run(["apt-get", "install", "-y", "slurm-wlm", "munge"], capture_output=True, text=True)
        if done.returncode: return f"apt-get install slurm-wlm munge: {done.stderr.strip().splitlines()[-1]}"
    return ""


def start(folder: Path) -> list[subprocess.Popen]:
    "munged, slurmctld and slurmd."
    for name in ("state", "spool"): (folder/name).mkdir()
    PLACE.write_text(CONF.format(host=socket.gethostname(), folder=folder))  # submitit forgets SLURM_CONF
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    munged = [] if Path("/run/munge/munge.socket.2").exists() else [
        subprocess.Popen(["runuser", "-u", "munge", "--", "munged", "--foreground"], stderr=subprocess.DEVNULL)]
    time.sleep(2)
    controller = subprocess.Popen(["slurmctld", "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [*munged, controller, daemon()]


def daemon() -> subprocess.Popen:
    return subprocess.Popen(["slurmd", "-D", "-N", "localhost"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def jobs() -> list[list[str]]:
    "Number, state and name of each job."
    lines = run("squeue", "-h", "-o", "%i %T %j", check=False).splitlines()
    return [line.split(maxsplit=2) for line in lines]


def running(seen: set[str], over: threading.Event) -> str:
    "A running job that was not seen before, which must have begun to compute."
    while not over.is_set():
        for number, state, name in jobs():
            if state == "RUNNING" and number not in seen:
                say("running:", number, name)
                time.sleep(3)
                seen.add(number)
                if number in {n for n, state, _ in jobs() if state == "RUNNING"}: return number
        time.sleep(0.5)
    return ""


def disturb(daemons: list[subprocess.Popen], over: threading.Event, told: list[str]) -> None:
    "Cancel one job; then kill slurmd and the job that runs."
    seen: set[str] = set()
    if number := running(seen, over):
        run("scancel", number)
        told.append(f"cancelled job {number}")
        say(told[-1])
    if number := running(seen, over):
        daemons[-1].kill()
        for pid in run("pgrep", "-f", f"slurmstepd.*{number}", check=False).split():
            for child in [*run("pgrep", "-P", pid, check=False).split(), pid]:
                os.kill(int(child), signal.SIGKILL)
        told.append(f"killed slurmd while job {number} ran")
        say(told[-1])
        time.sleep(20)
        say("sinfo:", run("sinfo", "-h", "-o", "%T", check=False))
        daemons.append(daemon())
        say("slurmd is started again")


def table(folder: Path, execution: str) -> str:
    command = ["papermill", "nbs/table1.ipynb", str(folder/f"{execution}.ipynb"), "-k", "python3", "--no-progress-bar",
               "-p", "methods", "ir,vi", "-p", "out", str(folder/execution), "-p", "execution", execution]
    subprocess.run(command, check=True, cwd=ROOT)
    return next((folder/execution).rglob("table1.csv")).read_text()


def main() -> int:
    if why := installed():
        say(f"skipped: {why}")
        return 0
    folder, told, over = Path(tempfile.mkdtemp()), list[str](), threading.Event()
    daemons = start(folder)
    try:
        time.sleep(5)
        say("sinfo:", run("sinfo", "-h", "-o", "%N %T"))
        thread = threading.Thread(target=disturb, args=(daemons, over, told))
        thread.start()
        there = table(folder, "slurm")
        over.set()
        thread.join()
        say("table 1 by slurm is complete:", len(there.splitlines()) - 1, "values")
        here = table(folder, "local")
        say("equal to the local one:", here == there, *told)
        return int(here != there or len(told) < 2)
    finally:
        over.set()
        for process in reversed(daemons): process.terminate()
        PLACE.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
