"""Tensors brought to where they are worked with, the next one ahead of time: GPU streams are stood in for."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from laplace_lora_fast import devices
from laplace_lora_fast.devices import brought, room


def test_all_come_in_order_and_as_they_are():
    tensors = [torch.randn(3, 2).half(), torch.randn(1), torch.randn(0, 4)]
    found = list(brought(tensors, [torch.device("cpu")] * 3))
    assert all(one is other for one, other in zip(found, tensors, strict=True))
    assert [each.device.type for each in brought(tensors, [torch.device("meta")] * 3)] == ["meta"] * 3
    assert list(brought([], [])) == []


class Far:
    """A tensor of CPU memory on its way to a GPU, which tells what happens to it."""

    device = torch.device("cpu")

    def __init__(self, name, events):
        self.name, self.events = name, events

    def to(self, device, non_blocking):
        assert non_blocking
        self.events.append(f"copy {self.name} on {self.events.stream}")
        return self

    def record_stream(self, stream):
        assert stream.name == "work"
        self.events.append(f"keep {self.name}")


class Events(list):
    stream = "work"


@pytest.fixture
def events(monkeypatch):
    """Streams of a GPU that there is not: what they are asked to do, in order."""
    found = Events()

    @contextmanager
    def inside(stream):
        found.stream, before = stream.name, found.stream
        yield
        found.stream = before

    work = SimpleNamespace(name="work", wait_event=lambda event: found.append(f"wait for {event}"))
    copies = SimpleNamespace(name="copies", record_event=lambda: found[-1].split(" on ")[0])
    fake = SimpleNamespace(
        Stream=lambda device: copies, stream=inside, current_stream=lambda device: work, Event=object
    )
    monkeypatch.setattr(devices.torch, "cuda", fake)
    return found


def test_the_next_is_copied_while_one_is_worked_with(events):
    """And no copy is read before it is there, nor its memory given away while it is read."""
    for tensor in brought([Far(name, events) for name in "abc"], [torch.device("cuda:0")] * 3):
        events.append(f"use {tensor.name}")
    assert events == [
        *("copy a on copies", "copy b on copies", "wait for copy a", "keep a", "use a"),
        *("copy c on copies", "wait for copy b", "keep b", "use b"),
        *("wait for copy c", "keep c", "use c"),
    ]


def test_half_of_what_is_free_is_room(monkeypatch):
    assert room([torch.device("cpu")]) is None
    fake = SimpleNamespace(
        mem_get_info=lambda device: (1000, 5000),
        memory_reserved=lambda device: 300,
        memory_allocated=lambda device: 100,
    )
    monkeypatch.setattr(devices.torch, "cuda", fake)
    assert room([torch.device("cuda:0")] * 3) == 600
    assert room([torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")]) == 1200
