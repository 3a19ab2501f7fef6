"""The commands that watch runs and end them: status, logs, why, stop, cancel."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

# Every import of launcher modules stands in a function: `mvit --help` must not wait for them.


def status(args: Namespace) -> int:
    """Show one run, a failed one's first failure too; or several as a table."""
    from launcher.follow import follow
    from launcher.overview import Overview, find_runs, look, the_run, watch
    from launcher.run_folder import RunFolder
    from launcher.slurm_queue import SlurmQueue
    from launcher.status import RunState
    from launcher.why import failure_details

    given = [Path(run_dir).absolute() for run_dir in args.run_dirs]
    if args.follow:
        if len(given) != 1:
            raise ValueError("--follow stays with one run: name it. Several at once: mvit status --watch")
        the_run(given[0])
        return follow(given[0], as_json=args.json)

    def find() -> list[Path]:
        return given or find_runs(Path(args.runs).absolute())

    def one(state: RunState) -> str:
        if args.json:
            return json.dumps(state.to_dict())
        if state.state != "failed":
            return str(state)
        return f"{state}\n{failure_details(RunFolder(Path(state.run_dir)), state)}"

    def text(seen: Overview) -> str:
        if len(given) == 1 and seen.states:
            return one(seen.states[0])
        return json.dumps(seen.to_list()) if args.json else str(seen)

    if len(given) == 1:
        the_run(given[0])  # says so if this is none
    if args.watch:
        seen = watch(find, text)
    else:
        seen = look(find(), SlurmQueue())
        print(text(seen))
    return 1 if seen.errors and given else 0


def logs(args: Namespace) -> int:
    """Print what ranks wrote."""
    from launcher.logs import Wanted, choose_attempt, follow_logs, show_logs, why_empty
    from launcher.overview import the_run

    run = the_run(Path(args.run_dir).absolute())
    kind = "stacks" if args.stacks else "submitit" if args.submitit else "log"
    if args.follow and args.stacks:
        raise ValueError("--follow shows logs as they grow; stacks are dumped once: leave one of the two out")
    first_only = kind == "log" and not args.all
    wanted = Wanted(kind, args.rank if args.rank is not None else 0 if first_only else None)
    try:
        if args.follow:
            lines = follow_logs(run, wanted, args.attempt, args.lines)
        else:
            attempt = choose_attempt(run, wanted, args.attempt)
            lines = show_logs(run, wanted, attempt, args.lines)
            if (note := why_empty(run, wanted, attempt)) is not None:
                print(note, file=sys.stderr)
        for line in lines:
            sys.stdout.write(line + "\n")
            if args.follow:
                sys.stdout.flush()
    except KeyboardInterrupt:  # how one leaves
        return 130
    return 0


def why(args: Namespace) -> int:
    """Explain what ended a run's last life, and what followed."""
    from launcher.overview import the_run
    from launcher.why import explain

    found = explain(the_run(Path(args.run_dir).absolute()).path, args.attempt)
    print(json.dumps(found.to_dict()) if args.json else found)
    return 0


def stop(args: Namespace) -> int:
    """Ask runs to save and end."""
    from launcher.run_folder import RunFolder
    from launcher.stop import request_stop, wait_for_stop

    def end(run_dir: Path) -> str:
        run = RunFolder(run_dir)
        latest = {event["event"] for event in run.events() if event["attempt"] == run.last_attempt()}
        starting = "start" in latest and not latest & {"first_step", "end"}
        done = request_stop(run_dir)
        return f"{done}; it is still starting: it saves after its first step" if starting else done

    def finish(run_dir: Path) -> tuple[bool, str]:
        state = wait_for_stop(run_dir, args.timeout)
        return state.state in ("stopped", "finished"), str(state)

    return _each(args, end, finish)


def cancel(args: Namespace) -> int:
    """End runs at once."""
    from launcher.stop import cancel as cancel_run
    from launcher.stop import wait_until_gone

    def finish(run_dir: Path) -> tuple[bool, str]:
        gone = wait_until_gone(run_dir, args.timeout)
        return gone, f"{run_dir}: no process of it is left" if gone else f"{run_dir}: still ending"

    return _each(args, cancel_run, finish)


def _each(args: Namespace, end: Callable[[Path], str], finish: Callable[[Path], tuple[bool, str]]) -> int:
    """End each run, then wait for each if asked; one that cannot be ended does not keep the others from it."""
    from launcher.overview import the_run

    run_dirs = [Path(run_dir).absolute() for run_dir in args.run_dirs]
    told: dict[Path, dict[str, object]] = {}
    ending, ok = [], True
    for run_dir in run_dirs:
        try:
            done = end(the_run(run_dir).path)
        except (ValueError, OSError) as error:
            if len(run_dirs) == 1 and not args.json:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            told[run_dir] = {"error": str(error)}
            ok = False
            continue
        ending.append(run_dir)
        told[run_dir] = {"done": done}
        if not args.json:
            print(done if len(run_dirs) == 1 else f"{run_dir}: {done}", flush=True)
    for run_dir in ending if args.wait else ():
        fine, text = finish(run_dir)
        told[run_dir]["ended"] = fine
        ok = ok and fine
        if not args.json:
            print(text, flush=True)
    if args.json:
        print(json.dumps([{"run_dir": str(path), "state": _state(path)} | facts for path, facts in told.items()]))
    return 0 if ok else 1


def _state(run_dir: Path) -> str | None:
    """Return what a run is doing after that, None for a folder that is none."""
    from launcher.judgement import judge
    from launcher.run_folder import RunFolder

    run = RunFolder(run_dir)
    return judge(run).state if run.run_file.exists() else None
