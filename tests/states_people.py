"""Two people, one server: everything they can do, as acts that hypothesis puts in a random order.

After every act the product and the model (tests/states_table.py) must agree on the answer, the states, the commands allowed,
the checkpoints, the queue, the current model, the datasets and who has the device. tests/states_house.py is the server.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests import runs
from tests.states_house import House
from tests.states_table import CAN_WAIT, LIVE, TABLE, Model, Run, diagram
from trainer import checkpoint, states
from trainer.lease import Busy
from trainer.run import status
from trainer.run_delete import name_to_type

COMMANDS = ("pause", "checkpoint", "stop", "stop-now", "resume", "resume-around", "leave", "discard")
USERS = st.sampled_from(["owner", "operator"])
PICK = st.integers(0, 7)
FILES = {"a.jsonl": b'{"text": "a"}\n', "b.jsonl": b'{"text": "b"}\n', "again.jsonl": b'{"text": "a"}\n', "a.pdf": b"a"}
TERMINAL = os.environ.get("USER", "command line")


class TwoPeople(RuleBasedStateMachine):
    """Acts of an owner, an operator and the world; `sources` and `real` are set by the tests."""

    sources: tuple[Path, Path]
    real = False
    drawn = {(before, after) for before, after, _ in diagram()}
    counts: dict[str, int] = {}

    def __init__(self) -> None:
        super().__init__()
        self.house, self.model = House(*self.sources, real=self.real), Model()
        self.count("sequences")

    def teardown(self) -> None:
        """End the server and take the workspace away."""
        self.house.close(self.model.live is not None)

    def pick(self, number: int) -> tuple[str, Run]:
        """One of the runs there ever were, a deleted one too."""
        run_id = list(self.model.runs)[number % len(self.model.runs)]
        return run_id, self.model.runs[run_id]

    def saved(self) -> list[tuple[str, int]]:
        """(run, step) of every checkpoint that is there."""
        there = ((run_id, run) for run_id, run in self.model.runs.items() if run.state != "[*]")
        return [(run_id, step) for run_id, run in there for step in sorted(run.saved)]

    def at_rest(self) -> list[str]:
        """Runs that can be resumed."""
        return [run_id for run_id, run in self.model.runs.items() if "resume" in TABLE.get(run.state, ())]

    def were_current(self) -> list[str]:
        """Runs that are there, of which a checkpoint was the current model, and of which none is now."""
        promoted = dict.fromkeys(run_id for run_id, _ in self.model.history)
        there = [run_id for run_id in promoted if self.model.runs[run_id].state != "[*]"]
        return [run_id for run_id in there if run_id != self.model.history[0][0]]

    def count(self, what: str, so: bool = True) -> None:
        """One more of `what`, where it is so."""
        self.counts[what] = self.counts.get(what, 0) + so

    def answers(self, wanted: int, user: str, path: str, **body: Any) -> dict[str, Any]:
        """A request by `user` is answered with the status `wanted`, and with a sentence where it is refused."""
        code, reply = self.house.ask(user, "POST", path, **body)
        assert code == wanted, (user, path, body, code, reply)
        assert code < 400 or len(reply["error"]) > 20, reply
        return reply

    # -- starting

    @initialize(promoted=st.integers(0, 2))
    def there_is_something_to_lose(self, promoted: int) -> None:
        """Some runs have finished, and the last checkpoint of each was made the current model."""
        for _ in range(promoted):
            self.start("owner", 0)
            self.train_to_the_end()
            self.promote_what_is_there("owner", -1)

    def _made(self, run_id: str, user: str, resumes: int) -> None:
        self.model.runs[run_id] = Run(user, resumes, f"run {len(self.model.runs)}")
        self.count("runs")

    @rule(user=USERS, resumes=st.integers(0, 2))
    def start(self, user: str, resumes: int) -> None:
        """A new run, or a refusal that names who has the device."""
        config, name = self.house.settings(resumes), f"run {len(self.model.runs)}"
        if self.model.live is not None:
            holder = self.model.runs[self.model.live]
            with pytest.raises(
                Busy, match=rf"The run {holder.name} \(started by {holder.owner}\) has the device since"
            ):
                self.house.engine.start_run(config, user, name)
            return
        run_id = self.house.engine.start_run(config, user, name)
        self._made(run_id, user, resumes)
        self.model.begin(run_id, user)
        self.house.began()

    @rule(user=USERS, resumes=st.integers(0, 2))
    def queue_a_new_run(self, user: str, resumes: int) -> None:
        """A new run that waits."""
        name = f"run {len(self.model.runs)}"
        run_id = self.house.engine.enqueue_new(self.house.settings(resumes), user, name)
        self._made(run_id, user, resumes)
        self.model.queue.append((run_id, user))

    @precondition(lambda self: self.model.runs)
    @rule(user=USERS, number=PICK, act=st.sampled_from(["add", "move", "remove"]), place=st.integers(0, 3))
    def change_the_queue(self, user: str, number: int, act: str, place: int) -> None:
        """Add a run that rests, move one, take one out."""
        run_id, run = self.pick(number)
        queue = self.model.queue
        at = next((at for at, entry in enumerate(queue) if entry[0] == run_id), None)
        good = (run.state in CAN_WAIT and at is None) if act == "add" else (at is not None or act == "remove")
        self.answers(200 if good else 400, user, "/api/queue", json={"act": act, "run_id": run_id, "place": place})
        if good and act == "add":
            queue.append((run_id, user))
        elif at is not None and act == "move":
            queue.insert(min(place, len(queue) - 1), queue.pop(at))
        elif at is not None and act == "remove":
            queue.pop(at)

    @rule(user=USERS, act=st.sampled_from(["hold", "go"]))
    def hold_the_queue(self, user: str, act: str) -> None:
        """Hold the queue back, or let it go on."""
        self.answers(200, user, "/api/queue", json={"act": act})
        self.model.held_by = user if act == "hold" else ""

    @rule()
    def the_queue_is_tended(self) -> None:
        """What the server does twice a second."""
        first = None
        if self.model.live is None and not self.model.held_by and self.model.queue:
            first, by = self.model.queue[0]
            self.model.begin(first, by)
        assert self.house.engine.start_next() == first
        if first is not None:
            self.house.began()

    # -- commands

    @precondition(lambda self: self.model.runs)
    @rule(user=USERS, number=PICK, command=st.sampled_from(COMMANDS))
    def command(self, user: str, number: int, command: str) -> None:
        """A button of the page, shown or not."""
        run_id, run = self.pick(number)
        path = f"/api/runs/{run_id}/command"
        wanted = 404 if run.state == "[*]" else 202 if command in TABLE[run.state] else 409
        starts = command in ("resume", "resume-around")
        if wanted == 202 and starts and self.model.live is not None:
            wanted = 400
        reply = self.answers(wanted, user, path, json={"command": command})
        if wanted == 400:
            assert "has the device since" in reply["error"]
        elif wanted == 202 and starts:
            run.around = run.around or command == "resume-around"
            self.model.begin(run_id, user)
            self.house.began()
        elif wanted == 202:
            self._given(run, command, user)

    @precondition(lambda self: self.model.live and self.at_rest())
    @rule(user=USERS, number=PICK)
    def resume_while_another_is_trained(self, user: str, number: int) -> None:
        """Refused: the other one has the device."""
        rest = self.at_rest()
        reply = self.answers(400, user, f"/api/runs/{rest[number % len(rest)]}/command", json={"command": "resume"})
        assert "has the device since" in reply["error"]
        self.count("resumes refused")

    @precondition(lambda self: self.model.runs)
    @rule(number=PICK, command=st.sampled_from(["pause", "checkpoint", "stop", "leave", "discard"]))
    def command_in_a_terminal(self, number: int, command: str) -> None:
        """The same without the page; its exit status says whether it meant something."""
        run_id, run = self.pick(number)
        good = command in TABLE.get(run.state, ())
        assert self.house.command_line(command, str(self.house.workspace.runs / run_id)) == (0 if good else 2)
        if good:
            self._given(run, command, TERMINAL)

    def _given(self, run: Run, command: str, by: str) -> None:
        if command in ("leave", "discard"):
            run.enter("stopped")
            return
        run.dropped.append((command, by))
        if self.real:
            self._read(run)

    def _read(self, run: Run) -> None:
        """The product's own thread reads commands ten times a second; wait until it has."""
        self.model.look(run)
        folder = self.house.workspace.run(self.model.live or "").control
        runs.wait_for(lambda: not list(folder.glob("*.json")), 5)
        wanted, log = run.state, self.house.workspace.run(self.model.live or "")
        runs.wait_for(lambda: status(log).state == wanted, 5)
        life = self.house.gate.life
        assert life is not None
        runs.wait_for(lambda: life.signals.save_asked.is_set() == run.save_asked, 5)

    @precondition(lambda self: self.model.live and not self.real)
    @rule()
    def the_trainer_reads_its_commands(self) -> None:
        """Acknowledge whatever was dropped, in the order in which it was."""
        assert self.house.tell("look") == "gate"
        self.model.look(self.model.runs[self.model.live or ""])

    # -- training

    @precondition(lambda self: self.model.live)
    @rule(steps=st.integers(1, 3))
    def train(self, steps: int) -> None:
        """The trainer goes on by some gates."""
        for _ in range(steps):
            if (live := self.model.live) is not None:
                heard = self.house.tell("go")
                self.model.go(live)
                assert heard == ("gate" if self.model.live else "ended")

    @precondition(lambda self: self.model.live)
    @rule()
    def train_to_the_end(self) -> None:
        """The trainer goes on until its life is over."""
        while (live := self.model.live) is not None:
            heard = self.house.tell("go")
            self.model.go(live)
            assert heard == ("gate" if self.model.live else "ended")

    @precondition(lambda self: self.model.live)
    @rule()
    def fail(self) -> None:
        """A fault in the trainer."""
        assert self.house.tell("fail") == "ended"
        self.model.fail(self.model.live or "", "failed")

    @precondition(lambda self: any(run.state == "running" and not run.around for run in self.model.runs.values()))
    @rule()
    def diverge(self) -> None:
        """Weights that are no numbers."""
        assert self.house.tell("diverge") == "ended"
        self.model.fail(self.model.live or "", "diverged")

    @precondition(lambda self: self.model.live)
    @rule(in_a_save=st.booleans())
    def kill(self, in_a_save: bool) -> None:
        """The server is killed, and a new one comes up."""
        assert self.house.tell("kill in a save" if in_a_save else "kill") == "ended"
        self.house.killed()
        if self.model.server_went() is not None:
            self.house.began()

    @rule()
    def end_the_server(self) -> None:
        """The server is ended as a service manager does it: what is live is stopped at its step and saved."""
        live = self.model.live
        self.house.restart(live is not None)
        if live is not None:
            run = self.model.runs[live]
            run.wish = run.wish or ("stop", "shutdown of the server")
            self.model.go(live)
        if self.model.server_comes() is not None:
            self.house.began()

    # -- what must never be lost

    @precondition(lambda self: self.model.runs)
    @rule(user=USERS, number=PICK, right=st.booleans())
    def delete(self, user: str, number: int, right: bool) -> None:
        """Delete a run for good: the owner alone, its name typed, at rest, and not the one that is the current model."""
        self._delete(user, self.pick(number)[0], right)

    def _delete(self, user: str, run_id: str, right: bool) -> None:
        run = self.model.runs[run_id]
        current = bool(self.model.history) and self.model.history[0][0] == run_id
        good = right and run.state not in LIVE and not current
        there = run.state != "[*]"
        wanted = 403 if user == "operator" else 404 if not there else 200 if good else 400
        self.answers(wanted, user, f"/api/runs/{run_id}/delete", json={"name": run.name if right else "another"})
        if wanted == 400 and right and current:
            self.count("deletions of the current model refused")
        if wanted == 200:
            self.count("deletions after a promotion", any(owner == run_id for owner, _ in self.model.history))
            run.enter("[*]")
            self.model.unqueue(run_id)

    @precondition(lambda self: self.model.history)
    @rule()
    def delete_the_current_one(self) -> None:
        """The owner deletes the run of the current model."""
        self._delete("owner", self.model.history[0][0], True)

    @precondition(lambda self: self.were_current())
    @rule(number=PICK)
    def delete_one_that_was_current(self, number: int) -> None:
        """The owner deletes a run whose checkpoint was the current model, and is no more."""
        were = self.were_current()
        self._delete("owner", were[number % len(were)], True)

    @precondition(lambda self: self.model.runs)
    @rule(user=USERS, number=PICK, step=st.integers(1, 4))
    def promote(self, user: str, number: int, step: int) -> None:
        """Make a checkpoint the current model."""
        self._promote(user, self.pick(number)[0], step)

    @precondition(lambda self: self.saved())
    @rule(user=USERS, number=PICK)
    def promote_what_is_there(self, user: str, number: int) -> None:
        """Make one of the checkpoints that are there the current model."""
        saved = self.saved()
        self._promote(user, *saved[number % len(saved)])

    def _promote(self, user: str, run_id: str, step: int) -> None:
        run = self.model.runs[run_id]
        good = step in run.saved and self.model.history[:1] != [(run_id, step)]
        wanted = 404 if run.state == "[*]" else 200 if good else 400
        self.answers(wanted, user, f"/api/runs/{run_id}/promote", json={"step": step})
        if wanted == 200:
            self.count("promotions")
            self.model.history.insert(0, (run_id, step))

    @rule(user=USERS)
    def roll_back(self, user: str) -> None:
        """Go back to the model that was current before, if it is still there."""
        before = self.model.history[1:2]
        good = bool(before) and self.model.runs[before[0][0]].state != "[*]"
        self.answers(200 if good else 400, user, "/api/current/roll-back", json={})
        if good:
            self.model.history.pop(0)

    @rule(user=USERS, name=st.sampled_from(sorted(FILES)))
    def upload(self, user: str, name: str) -> None:
        """Upload a dataset; the same bytes twice are one, what cannot be read is refused."""
        good = name.endswith(".jsonl")
        code, _ = self.house.ask(user, "POST", "/api/data/upload", params={"name": name}, content=FILES[name])
        assert code == (201 if good else 400)
        if good:
            self.model.uploads.add(FILES[name])

    @rule()
    def both_see_the_same(self) -> None:
        """The list of runs is the same for both, and is the model's."""
        seen = [self.house.ask(user, "GET", "/api/runs")[1] for user in ("owner", "operator")]
        assert seen[0]["runs"] == seen[1]["runs"] and seen[0]["queue"] == seen[1]["queue"]
        wanted = {run_id: run.state for run_id, run in self.model.runs.items() if run.state != "[*]"}
        assert {row["run_id"]: row["state"] for row in seen[0]["runs"]} == wanted
        assert all(set(row["allowed"]) == TABLE[row["state"]] for row in seen[0]["runs"])

    # -- the agreement

    @invariant()
    def product_and_model_agree(self) -> None:
        """States, commands allowed, checkpoints, queue, current model, datasets, device."""
        self.count("acts")
        workspace, model = self.house.workspace, self.model
        there = {run_id: run for run_id, run in model.runs.items() if run.state != "[*]"}
        assert sorted(os.listdir(workspace.runs)) == sorted(there), "a run was lost, or half of one is left"
        for run in model.runs.values():
            assert set(zip(run.path, run.path[1:], strict=False)) <= self.drawn, run.path
        for run_id, run in there.items():
            at = workspace.run(run_id)
            assert status(at).state == run.state, run_id
            assert set(states.allowed(status(at).state)) == TABLE[run.state]
            assert {step for step, _ in checkpoint.listed(at.checkpoints)} == run.saved, (run_id, run)
            assert name_to_type(at) == run.name
        waiting = workspace.queue.read()
        assert [(entry.run_id, entry.by) for entry in waiting.entries] == model.queue
        assert waiting.held_by == model.held_by
        history = workspace.current.history()
        assert [(entry.run_id, entry.step) for entry in history] == model.history
        assert not history or checkpoint.verify(history[0].checkpoint) == [], "the current model was lost"
        assert {info.path.read_bytes() for info in workspace.datasets()} == model.uploads
        holder = self.house.engine.holder()
        assert (holder.run_id if holder else None) == model.live
