"""What rendering into the same folder again says of boards that have a worker already."""

from __future__ import annotations

from edge_llm.config import WorkerRole
from edge_llm.plan.changes import Change, Earlier, changes, earlier_of, moves, remarks
from tests.plan.test_fit import fit, pi

BEFORE: dict[str, WorkerRole] = {"a": "prefill", "b": "decode", "c": "decode", "d": "decode"}


def changed(given: dict[str, WorkerRole | None], before: dict[str, WorkerRole]) -> tuple[Change, ...]:
    return changes(Earlier(before), fit([pi(name, role=role) for name, role in given.items()], earlier=before))


def test_the_roles_of_a_rendering_are_read_from_its_labels() -> None:
    text = (
        "# Rendered by `edge-llm cluster render`: tiny\n"
        "#   kubectl label node pi-a edge-llm/role=prefill\n"
        "#   kubectl label node pi-b pi-c.lan edge-llm/role=decode\n"
        "apiVersion: x\n"
    )
    roles: dict[str, WorkerRole] = {"pi-a": "prefill", "pi-b": "decode", "pi-c.lan": "decode"}
    assert earlier_of(text) == Earlier(roles)
    by_an_earlier_version = text.replace("label node", "label node --overwrite")
    assert earlier_of(by_an_earlier_version).roles == roles


def test_boards_that_may_do_anything_change_nothing_however_many_come() -> None:
    grown: dict[str, WorkerRole | None] = dict.fromkeys("abcdef")
    assert changed(grown, BEFORE) == ()


def test_a_role_that_is_given_by_hand_is_a_change_of_a_board_that_was_there_only() -> None:
    given: dict[str, WorkerRole | None] = {"a": None, "b": "prefill", "c": None, "new": "prefill"}
    assert changed(given, BEFORE) == (Change("b", "decode", "prefill"),)


def test_a_change_is_made_by_replacing_the_worker_and_why_is_said() -> None:
    change = Change("pi-b", "decode", "prefill")
    (command,) = moves([change], Earlier({"pi-a": "prefill", "pi-b": "decode"}), "my-cluster")
    assert command.startswith("edge-llm cluster role POD prefill --kubeconfig FILE ")
    assert command.endswith("# POD: the edge-llm-decode-N on pi-b")
    (why,) = remarks([change], is_labelled=False)
    assert "pi-b (decode -> prefill). A label alone would move nobody" in why
    assert "kubectl label node --overwrite pi-b edge-llm/role=prefill" in why
    assert list(remarks([], is_labelled=False)) == []


def test_a_label_that_is_refused_is_explained_whenever_labels_are_given() -> None:
    """An order that was printed once may not have been followed: the second rendering does not know of it."""
    (why,) = remarks([], is_labelled=True)
    assert "`already has a value`" in why
    assert "edge-llm cluster role POD ROLE" in why


def test_a_role_that_nobody_had_gets_a_workload_without_pods_to_move_to() -> None:
    two = [Change("a", "mixed", "prefill"), Change("b", "mixed", "decode")]
    commands = moves(two, Earlier({"a": "mixed", "b": "mixed"}), "'my cluster'")
    assert commands[:4] == [
        "kubectl apply -k 'my cluster' -l edge-llm/role=prefill",
        "kubectl -n edge-llm scale statefulset edge-llm-prefill --replicas=0",
        "kubectl apply -k 'my cluster' -l edge-llm/role=decode",
        "kubectl -n edge-llm scale statefulset edge-llm-decode --replicas=0",
    ]
    assert [command.split()[3:5] for command in commands[4:]] == [["POD", "prefill"], ["POD", "decode"]]
