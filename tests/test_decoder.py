"""The decoder recommender against Hugging Face's own forward, position by position."""

import dataclasses

import pytest
import torch

from compress.blocks import state_index
from slmrec.errors import ConfigError
from slmrec.models.decoder import FAMILIES, DecoderModel, decoder_settings
from slmrec.models.prompt import Layout, attended_items, item_positions, suffix_positions

HISTORIES = torch.tensor([[0, 0, 0, 3, 4, 5], [6, 1, 2, 3, 4, 5]])
PROMPTS = ("none", "prefix", "slmrec")


def reference_user_vector(model: DecoderModel, items: list[int]) -> torch.Tensor:
    """One user alone, no padding, no cache: instruction, items, response through the decoder, read at the end."""
    spec, count = model.spec, len(items)
    vectors = torch.cat([model.prefix, model.item_inputs(torch.tensor(items)), model.suffix])
    start = spec.prefix_length
    first = start if spec.recipe.positions == "compact" else start + spec.max_history - count
    positions = [*range(start), *range(first, first + count + spec.suffix_length)]
    output = model.decoder(inputs_embeds=vectors[None], position_ids=torch.tensor([positions]))
    return output.last_hidden_state[0, -1]


@pytest.mark.parametrize("positions", ["compact", "padded"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_gives_what_each_user_alone_gives(tiny_model, family, prompt, positions):
    model = tiny_model(family=family, prompt=prompt, positions=positions).eval()
    users = model(HISTORIES)[-1][:, -1]
    for row in range(len(HISTORIES)):
        expected = reference_user_vector(model, [item for item in HISTORIES[row].tolist() if item])
        torch.testing.assert_close(users[row], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("histories", [HISTORIES, torch.tensor([[3, 4, 5], [7, 1, 2]])], ids=["mixed", "one length"])
@pytest.mark.parametrize("positions", ["compact", "padded"])
@pytest.mark.parametrize("prompt", ["prefix", "slmrec"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_instruction_changes_neither_states_nor_gradients(tiny_model, family, prompt, positions, histories):
    shared = tiny_model(family=family, prompt=prompt, positions=positions).eval()
    alone = DecoderModel(dataclasses.replace(shared.spec, share_prefix=False)).eval()
    alone.load_state_dict(shared.state_dict())
    for model in (shared, alone):
        torch.nn.functional.cross_entropy(model.score(histories), torch.tensor([5, 9])).backward()
    torch.testing.assert_close(shared.score(histories), alone.score(histories), atol=2e-4, rtol=1e-4)
    for (name, value), other in zip(shared.named_parameters(), alone.parameters(), strict=True):
        if value.grad is not None:
            scale = value.grad.abs().max()
            assert (value.grad - other.grad).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_activations_change_no_gradient(tiny_model, family, prompt):
    kept = tiny_model(family=family, prompt=prompt)
    kept = DecoderModel(dataclasses.replace(kept.spec, share_prefix=False))
    again = DecoderModel(kept.spec)
    again.load_state_dict(kept.state_dict())
    again.checkpoint_gradients()
    calls = []
    again.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (kept, again):
        model.train()
        torch.nn.functional.cross_entropy(model.score(HISTORIES), torch.tensor([5, 9])).backward()
    assert len(calls) == 2, "the layer is computed again"
    for (name, value), other in zip(kept.named_parameters(), again.parameters(), strict=True):
        if value.grad is not None:
            assert (value.grad - other.grad).abs().max() <= 1e-5 * value.grad.abs().max(), name


def test_padding_gives_no_nan_in_bfloat16_with_gradients(tiny_model):
    model = tiny_model(prompt="none").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model(HISTORIES)[-1]
    states[HISTORIES != 0].float().sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.grad is not None)


def test_states_after_layer_i_are_hugging_faces_hidden_states_i_plus_one(tiny_model):
    model = tiny_model(prompt="none").eval()
    items = torch.tensor([[3, 4, 5]])
    states = model(items)
    seen = []
    hooks = [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in model.decoder.layers]
    model(items)
    for hook in hooks:
        hook.remove()
    outputs = [output[0] if isinstance(output, tuple) else output for output in seen]
    for layer in range(model.num_layers - 1):
        torch.testing.assert_close(states[state_index(layer)], outputs[layer])
    torch.testing.assert_close(states[state_index(model.num_layers - 1)], model.decoder.norm(outputs[-1]))


def test_positions_of_both_conventions():
    ids = torch.tensor([[0, 0, 7, 8]])
    compact, padded = (Layout(5, 2, 10, name) for name in ("compact", "padded"))
    assert item_positions(ids, compact)[0, 2:].tolist() == [5, 6]
    assert suffix_positions(ids, compact)[0].tolist() == [7, 8]
    assert item_positions(ids, padded)[0, 2:].tolist() == [5 + 8, 5 + 9]
    assert suffix_positions(ids, padded)[0].tolist() == [15, 16]


def test_padded_positions_do_not_depend_on_the_tensors_width():
    layout = Layout(5, 0, 10, "padded")
    narrow, wide = torch.tensor([[7, 8]]), torch.tensor([[0, 0, 0, 7, 8]])
    assert item_positions(narrow, layout)[0, -2:].tolist() == item_positions(wide, layout)[0, -2:].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_compact_scores_do_not_depend_on_padding(tiny_model, prompt):
    model = tiny_model(prompt=prompt).eval()
    narrow, wide = torch.tensor([[7, 8]]), torch.tensor([[0, 0, 0, 7, 8]])
    torch.testing.assert_close(model.score(narrow), model.score(wide), atol=2e-5, rtol=1e-5)


def test_a_masked_item_is_seen_only_where_users_are_read_at_it():
    ids, masked = torch.tensor([[0, 5, 7, 5], [5, 5, 0, 7]]), (5,)
    with_suffix, without = Layout(4, 2, 10, "compact", masked), Layout(4, 0, 10, "compact", masked)
    assert attended_items(ids, with_suffix).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert attended_items(ids, without).int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert suffix_positions(ids, with_suffix).tolist() == [[5, 6], [5, 6]]


@pytest.mark.parametrize("positions", ["compact", "padded"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_history_of_masked_items_alone_gives_finite_scores_whatever_their_number(tiny_model, prompt, positions):
    plain = tiny_model(prompt=prompt, positions=positions)
    model = DecoderModel(dataclasses.replace(plain.spec, masked_ids=(5,))).eval()
    model.load_state_dict(plain.state_dict())
    several, one = model.score(torch.tensor([[5, 5, 5], [0, 0, 5]]))
    assert torch.isfinite(several).all()
    torch.testing.assert_close(several, one, atol=2e-5, rtol=1e-5)


def test_a_decoder_of_another_family_and_too_many_layers_are_refused():
    from transformers import GPT2Config, LlamaConfig

    with pytest.raises(ConfigError, match="gpt2 family is not supported"):
        decoder_settings(GPT2Config(), 2)
    with pytest.raises(ConfigError, match="decoder has 3"):
        decoder_settings(LlamaConfig(num_hidden_layers=3), 4)
