"""Files of a checkpoint that a thread writes from copies."""

import threading

import pytest
import torch

from wsft.distributed import state_writer
from wsft.distributed.state_writer import StateWriter


def make_state(device="cpu"):
    flat = torch.arange(10.0, device=device)
    state = {"flat": flat, "part": [flat[2:5], flat.view(2, 5).T], "empty": torch.empty(0, device=device)}
    state["param"] = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=device))
    return flat, state | {"step": 7, "names": ("a", "b"), "shape": torch.Size([2, 3]), "group": {"lr": 0.1, "params": [0]}}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", id="gpu")])
def test_a_file_holds_what_was_when_it_was_added(tmp_path, device):
    flat, state = make_state(device)
    writer = StateWriter(True, 1)
    for save in range(2):
        wanted = flat.clone()
        writer.add(state, str(tmp_path / "a.pt"))
        writer.add({"other": flat}, str(tmp_path / "b.pt"))
        flat += 100
        state["group"]["lr"] = 0.2
        writer.start()
        size, error = writer.wait()
        assert error is None and not writer.busy
        assert size == sum((tmp_path / name).stat().st_size for name in ("a.pt", "b.pt"))
        found = torch.load(tmp_path / "a.pt", weights_only=True)
        state["group"]["lr"] = 0.1
        assert torch.equal(found["flat"], wanted.cpu()) and found["group"] == {"lr": 0.1, "params": [0]}
        assert torch.equal(found["part"][0], wanted[2:5].cpu()) and torch.equal(found["part"][1], wanted.view(2, 5).T.cpu())
        assert found["part"][0].untyped_storage().data_ptr() == found["flat"].untyped_storage().data_ptr()  # written once
        assert isinstance(found["shape"], torch.Size)
        assert found["param"].dtype == torch.bfloat16 and found["empty"].numel() == 0 and found["names"] == ("a", "b")
        assert torch.equal(torch.load(tmp_path / "b.pt")["other"], wanted.cpu()), save


def test_nothing_is_written_before_all_is_copied_and_training_does_not_wait(tmp_path, monkeypatch):
    go_on, write = threading.Event(), StateWriter._write
    monkeypatch.setattr(StateWriter, "_write", lambda *args: go_on.wait(60) and write(*args))
    writer = StateWriter(True, 1)
    writer.add(make_state()[1], str(tmp_path / "a.pt"))
    writer.start()
    assert writer.busy and not (tmp_path / "a.pt").exists()
    go_on.set()
    assert writer.wait()[0] == (tmp_path / "a.pt").stat().st_size and not writer.busy


def test_where_nothing_is_trained_meanwhile_nothing_is_copied(tmp_path, monkeypatch):
    writer = StateWriter(True, 1)
    monkeypatch.setattr(writer, "_copied", lambda state: pytest.fail("copied"))
    writer.at_once = True
    writer.add(make_state()[1], str(tmp_path / "a.pt"))
    assert (tmp_path / "a.pt").exists()
    writer.start()
    assert not writer.busy and writer.wait() == ((tmp_path / "a.pt").stat().st_size, None)


@pytest.mark.parametrize("in_background", [True, False])
def test_an_error_is_told_once(tmp_path, in_background):
    writer = StateWriter(in_background, 1)
    writer.add({"x": torch.ones(2)}, str(tmp_path / "missing" / "a.pt"))
    writer.start()
    size, error = writer.wait()
    assert size == 0 and isinstance(error, FileNotFoundError)
    writer.add({"x": torch.ones(2)}, str(tmp_path / "a.pt"))
    writer.start()
    assert writer.wait() == ((tmp_path / "a.pt").stat().st_size, None)


def cannot_copy(state):
    raise MemoryError("no page is left")


@pytest.mark.parametrize("ranks, free, copies, said", [
    (1, 8001.0, None, ""),
    (2, 8001.0, None, "copies on 2 rank(s) of this host would take"),
    (1, 7999.0, None, "would take"),
    (1, None, None, ""),
    (1, None, cannot_copy, "no page is left"),
])  # fmt: skip
def test_without_room_for_copies_files_are_written_at_once_and_that_is_said(
    tmp_path, monkeypatch, caplog, ranks, free, copies, said
):
    monkeypatch.setattr(state_writer, "free_host_memory", lambda: free)
    writer = StateWriter(True, ranks)
    if copies:
        monkeypatch.setattr(writer, "_copied", copies)
    x = torch.ones(1000)  # 4,000 bytes; half of the free memory is 4,000.5 or 3,999.5
    for name in ("a.pt", "b.pt"):
        writer.add({"x": x, "same": x[:10]}, str(tmp_path / name))
        assert (tmp_path / name).exists() == bool(said)
    writer.start()
    assert writer.wait()[1] is None and (tmp_path / "b.pt").exists()
    assert said in caplog.text and len(caplog.records) == bool(said)
