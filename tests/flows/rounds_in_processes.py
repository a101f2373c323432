"""Runs the flow in processes of their own that can be killed at an exact point. Not a test by itself."""

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any


def run_rounds(
    values: dict[str, Any], rounds: int, kill_at: int | str | None, after: bool, kill_rank_in: str | None = None
) -> None:
    """Run the flow ``d3po``; with ``kill_at``, die by SIGKILL at that commit of a file, before or after it.

    A text is a part of the path of the file that is committed.

    With ``kill_rank_in``, the second of several processes is killed when that stage has begun its work, once.

    Every file that a campaign keeps comes into being by ``os.replace``: these are all the points at which what a killed
    run leaves behind can differ. They are counted over all attempts of a campaign; what is done again counts once.
    """
    import torch

    from d3po.flows.round import d3po
    from d3po_core.config_values import load_config
    from d3po_core.paths import data_folder

    torch.set_num_threads(2)  # as on a user's two cores: these rounds are to be the same again
    replace, note = os.replace, data_folder() / f"{values['campaign']}.seen"
    seen = set(note.read_text().splitlines()) if note.exists() else set()
    times: Counter[str] = Counter()  # in this attempt: some files are written again and again

    def counted(source: Any, target: Any) -> None:
        times[str(target)] += 1
        commit = f"{target} {times[str(target)]}"
        named = isinstance(kill_at, str) and kill_at in str(target)
        here = named or (commit not in seen and len(seen) + 1 == kill_at)
        if commit not in seen:
            seen.add(commit)
            with note.open("a") as stream:
                stream.write(f"{commit}\n")
        if here and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if here and after:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted  # type: ignore[assignment]
    if kill_rank_in:
        _kill_a_rank_once(kill_rank_in, data_folder() / f"{values['campaign']}.killed")
    state = d3po(rounds, load_config(values, "test"), return_state=True)
    (data_folder() / f"{values['campaign']}.commits").write_text(str(len(seen)))
    (data_folder() / f"{values['campaign']}.message").write_text(str(state.message))
    os._exit(0 if state.is_completed() else 3)


def _kill_a_rank_once(stage: str, note: Path) -> None:
    from d3po_core.processes import engine
    from d3po_core.processes.job import GangJob

    kind = GangJob if stage == "train" else engine.QueueJob
    take = engine._Gang._once

    def killing(gang: Any, members: Any) -> Any:
        tell = gang.tell

        def told(count: int) -> None:
            tell(count)
            if isinstance(gang.job, kind) and not note.exists():
                os.kill(members[1].pid, signal.SIGKILL)
                note.write_text("rank 1")

        gang.tell = told
        return take(gang, members)

    engine._Gang._once = killing  # type: ignore[method-assign]
