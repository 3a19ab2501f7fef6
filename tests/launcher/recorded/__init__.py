"""What the commands of a real Slurm 22.05 printed (4 nodes × 2 CPUs × 2 GPUs, slurmdbd), and stand-ins that repeat it.

Partitions: low (default, preemptable), high, short (node1 and node2, one node for 30 minutes). node4 was drained.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "slurm_22.05"
_SCONTROL = """#!/bin/sh
case "$*" in
  "show config") cat "{folder}/config.txt" ;;
  "-o -a show partition") cat "{folder}/partition.txt" ;;
  "-o -a show node") cat "{folder}/node.txt" ;;
  "show hostnames "*) shift 2; echo "$1" | tr , '\\n' ;;
  "-o show job "*) shift 3; cat "{bin}/job_$1" 2>/dev/null || {{ echo Invalid job id specified >&2; exit 1; }} ;;
  *) echo "unexpected: $*" >&2; exit 2 ;;
esac
"""
_SACCTMGR = """#!/bin/sh
case "$*" in
  *"show account"*) cat "{folder}/account.txt" ;;
  *"show qos"*) cat "{folder}/qos.txt" ;;
  *"show assoc"*) cat "{folder}/assoc.txt" ;;
esac
"""


def install(bin_dir: Path) -> None:
    """Put `scontrol`, `sacctmgr` and `sacct` into a folder; a file `job_ID` there is what scontrol says of a job."""
    bin_dir.mkdir(exist_ok=True)
    for name, text in (("scontrol", _SCONTROL), ("sacctmgr", _SACCTMGR), ("sacct", "#!/bin/sh\nexit 0\n")):
        (bin_dir / name).write_text(text.format(folder=FOLDER, bin=bin_dir))
        (bin_dir / name).chmod(0o755)


def read(name: str) -> str:
    """Return one recorded answer."""
    return (FOLDER / f"{name}.txt").read_text()
