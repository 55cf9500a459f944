"""A step of generation is a fixed computation of few operations: its recording, repeated, draws the tokens of calls."""

import gc
import warnings
from unittest import mock

import pytest
import torch

from ssmttm.generation import Sampling, generate
from ssmttm.model import repetition
from ssmttm.model.architecture import ARCHITECTURES
from ssmttm.model.repetition import repeat
from ssmttm.model.stepping import Decoder
from tests.benchmarks import graphs
from tests.ssmttm.small import CAPTIONS, small_config, small_model, text_for
from tests.ssmttm.tape import Tape

CPU = torch.device("cpu")
FRAMES = 40
SAMPLINGS = {
    "guided": Sampling(top_k=20, top_p=0.9, temperature=1.1),
    "plain": Sampling(top_k=None, guidance=1.0),
}
OPERATIONS = {"mamba2": 19, "self_attention": 6, "cross_attention": 5, "feed_forward": 5}
"""Operations of a step by sub-layer, with its norm and the addition of its output."""
AROUND = 28
"""Operations of a step outside the blocks: embeddings, head, guidance, drawing."""


@pytest.fixture
def model_and_text(architecture):
    """A model of two codebooks, and captions of unequal lengths."""
    config = small_config(architecture, n_codebooks=2)
    return small_model(config), text_for(config, CAPTIONS, dropped=[False, False, False, True])


@pytest.fixture
def recordings(monkeypatch):
    """Record steps on the CPU, for memories of 8, 16, .. steps; returns the recordings."""
    made: list[Tape] = []

    def record(call):
        made.append(Tape(call))
        return made[-1]

    monkeypatch.setattr(repetition, "recorder", lambda device: record)
    monkeypatch.setattr(repetition, "FIRST_REACH", 8)
    return made


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_a_repeated_recording_draws_the_tokens_of_calls(model_and_text, sampling, request):
    model, text = model_and_text
    expected = generate(model, text, FRAMES, sampling, range(4))
    recordings = request.getfixturevalue("recordings")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as a step that cannot be recorded gives
        assert torch.equal(generate(model, text, FRAMES, sampling, range(4)), expected)
    assert len(recordings) == 4  # up to 8, 16, 32 and 41 steps


@pytest.mark.parametrize("architecture", ["cross_transformer"])
def test_every_batch_has_its_own_recordings(model_and_text, recordings):
    model, text = model_and_text
    together = generate(model, text, FRAMES, Sampling(), range(4))
    last = text_for(model.config, CAPTIONS[1:2])  # fewer rows, and a text of another length
    assert torch.equal(generate(model, last, FRAMES, Sampling(), [1])[0], together[1])


@pytest.mark.parametrize("architecture", ["cross_transformer"])
def test_a_step_that_cannot_be_recorded_is_called_with_one_warning(model_and_text, monkeypatch):
    model, text = model_and_text
    expected = generate(model, text, FRAMES, Sampling(), range(4))
    record = mock.Mock(side_effect=RuntimeError("operation not permitted when stream is capturing"))
    monkeypatch.setattr(repetition, "recorder", lambda device: record)
    monkeypatch.setattr(repetition, "FIRST_REACH", 8)
    with pytest.warns(RuntimeWarning, match="one by one, which is slower: operation not permitted") as found:
        assert torch.equal(generate(model, text, FRAMES, Sampling(), range(4)), expected)
    assert len(found) == record.call_count == 1


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 17])
def test_a_step_is_done_as_often_as_wanted_within_its_reach(steps, recordings):
    done = torch.zeros(1)
    reaches = []

    def step(reach):
        reaches.append(reach)
        done.add_(1)

    repeat(step, steps, CPU)
    assert done == steps
    assert reaches == sorted(reaches)
    assert reaches[-1] == steps
    assert len(reaches) <= 2 * 3  # a call and a recording for each reach


def test_a_step_that_reads_a_value_is_called(recordings):
    done = torch.zeros(1)

    def step(reach):
        done.add_(1)
        assert 1 <= done.item() <= reach

    with pytest.warns(RuntimeWarning, match="not permitted"):
        repeat(step, 20, CPU)
    assert done == 20


def test_a_step_takes_few_operations(architecture, recordings):
    config = small_config(architecture, n_codebooks=2, n_blocks=3)
    generate(small_model(config), text_for(config, CAPTIONS), 6, Sampling(top_k=20), range(4))
    blocks = config.n_blocks * sum(OPERATIONS[name] for name in ARCHITECTURES[architecture])
    assert len(recordings[0].operations) <= blocks + AROUND


@pytest.mark.parametrize("architecture", ["cross_simba", "cross_transformer"])  # with all layers between them
def test_a_decoder_holds_the_memory_that_is_stated(architecture):
    config = small_config(architecture, encoder="frozen")
    model, steps = small_model(config), 50

    def held(rows):
        text = text_for(config, CAPTIONS[:1] * rows)
        before = tensor_bytes()
        decoder = Decoder(model, text, steps)
        decoder.step(torch.zeros(rows, 1, dtype=torch.int64), 1)
        return tensor_bytes() - before

    d, positions, di = config.d_model, len(CAPTIONS[0].split()), config.d_inner
    stated = {
        "self_attention": 2 * d * steps,
        "cross_attention": 2 * d * positions,
        "mamba2": di * config.d_state + (config.d_conv + 1) * (di + 2 * config.n_groups * config.d_state),
        "feed_forward": 0,
    }
    a_row = 4 * config.n_blocks * sum(stated[name] for name in ARCHITECTURES[architecture])
    gc.collect()
    with torch.inference_mode():
        assert (held(9) - held(1)) / 8 == pytest.approx(a_row, rel=0.03)


def tensor_bytes():
    """Return the bytes of all tensors of this process."""
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and not each.is_mkldnn]
    return sum(
        {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values()
    )


def test_the_benchmark_of_graphs_measures_every_backbone():
    size = graphs.Size(
        dict.fromkeys(ARCHITECTURES, 1), 64, d_state=8, frames=4, text_positions=3, batches=(1, 2)
    )
    rows = list(graphs.measure(size, "cpu", rounds=1))
    assert len(rows) == 2 * len(ARCHITECTURES)
    assert all(float(row.ratio) > 0 for row in rows)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_a_graph_draws_the_tokens_of_launched_steps(model_and_text, sampling, monkeypatch):
    model, text = model_and_text
    model = model.cuda()
    monkeypatch.setattr(repetition, "FIRST_REACH", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = generate(model, text, FRAMES, sampling, range(4))
    monkeypatch.setattr(repetition, "recorder", lambda device: lambda call: call)
    assert torch.equal(generate(model, text, FRAMES, sampling, range(4)), found)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_is_launched_with_a_warning():
    done = torch.zeros(1, device="cuda")

    def step(reach):
        done.add_(1)
        assert done.item() <= reach

    with pytest.warns(RuntimeWarning, match="cannot be recorded as a CUDA graph"):
        repeat(step, 20, done.device)
    assert done.item() == 20
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
