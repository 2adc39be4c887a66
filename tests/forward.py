"""Hugging Face's own forward of one user at a time, which serving graphs are compared with."""

import numpy as np
import torch

FAMILIES = [("llama", None), ("mistral", None), ("mistral", 3), ("qwen2", None), ("qwen3", 4)]
NUM_ITEMS, WINDOW = 20, 10


@torch.no_grad()
def scores_of(model, history):
    """One user, without padding, cache or mask: instruction, items, response, in this order."""
    spec, items = model.spec, torch.tensor(history)
    rows = [model.prefix, model.item_inputs(items), model.suffix]
    first = spec.prefix_length
    newest = first + (WINDOW if spec.recipe.positions == "padded" else len(history))
    positions = [*range(first), *range(newest - len(history), newest), *range(newest, newest + spec.suffix_length)]
    state = model.decoder(inputs_embeds=torch.cat(rows)[None], position_ids=torch.tensor([positions])).last_hidden_state
    return model.logits(state[0, -1]).numpy()


def expected_list(scores, history, k):
    scores = scores.copy()
    scores[np.array(history) - 1] = -np.inf
    order = np.argsort(-scores, kind="stable")[:k]
    return order + 1, scores[order]
