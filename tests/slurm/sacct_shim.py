"""Stand-in for `sacct` on a cluster without a database: answers submitit's question from what the controller knows."""

import itertools
import re
import subprocess
import sys


def asked_jobs(arguments: list[str]) -> set[str]:
    """Return the job ids behind every -j, without the index of an array's task."""
    given = [value for option, value in itertools.pairwise(arguments) if option in ("-j", "--jobs")]
    return {job.split("_")[0] for value in given for job in value.split(",")}


def row(line: str, asked: set[str]) -> str | None:
    """Turn one job of `scontrol -o show jobs` into a row of `sacct -o JobID,State,NodeList --parsable2`."""
    job = dict(re.findall(r"(?:^|\s)([A-Za-z_:/]+)=(\S*)", line))
    main = job.get("ArrayJobId", job.get("JobId", ""))
    if asked and not asked & {main, job.get("JobId", "")}:
        return None
    task = job.get("ArrayTaskId")
    suffix = "" if task is None else f"_{task}" if task.isdigit() else f"_[{task}]"
    return "|".join([main + suffix, job.get("JobState", "UNKNOWN"), job.get("NodeList", "")])


if __name__ == "__main__":
    asked = asked_jobs(sys.argv[1:])
    jobs = subprocess.run(["scontrol", "-o", "show", "jobs"], text=True, capture_output=True, check=True).stdout
    print("\n".join(["JobID|State|NodeList", *(found for line in jobs.splitlines() if (found := row(line, asked)))]))
