"""The published recommenders on Hugging Face's own LlamaModel and PEFT's own LoRA, and the folders they leave behind.

Written from the description of E4SRec (arXiv:2312.02443) and SLMRec (arXiv:2405.17890) and of what their codes save.
"""

import json
import pickle
import warnings

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

NUM_ITEMS, DIM, HIDDEN, LAYERS, RANK = 20, 8, 32, 3, 4
INSTRUCTION = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nGiven the user\u2019s purchase history, "
    "predict next possible item to be purchased.\n\n### Input:\n"
)
RESPONSE = "\n### Response:\n"


def write_backbone(folder, *, seed=0, num_layers=LAYERS + 1, hidden=HIDDEN):
    """A tiny LLaMA with its tokenizer, which adds a BOS wherever it is not told otherwise."""
    torch.manual_seed(seed)
    words = sorted({word for text in (INSTRUCTION, RESPONSE) for word, _ in _splitter().pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(["<s>", "<unk>", *words])}
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=48, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(vocabulary), pad_token_id=None, bos_token_id=0, eos_token_id=None,
        initializer_range=0.15,
    )  # fmt: skip
    model = LlamaModel(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.copy_(1 + torch.randn_like(value) / 5)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def _splitter():
    return pre_tokenizers.Split(Regex(r"\n|[^\n ]+"), "removed", invert=True)


class Published(nn.Module):
    """Instruction, item vectors and response through a LoRA decoder; the last state is scored.

    `code` is "e4srec" (one score per table row) or "slmrec" (a projection, compared with the item table).
    """

    def __init__(self, backbone, code, *, seed=1, num_layers=LAYERS, alpha=16):
        super().__init__()
        torch.manual_seed(seed)
        decoder = LlamaModel.from_pretrained(backbone, dtype=torch.float32)
        decoder.layers = decoder.layers[:num_layers]
        decoder.config.num_hidden_layers = num_layers
        lora = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["gate_proj", "up_proj", "down_proj"])
        with warnings.catch_warnings():  # PEFT asks transformers for a name that it is about to lose
            warnings.simplefilter("ignore", FutureWarning)
            self.llama_model = get_peft_model(decoder, lora)
        rows = NUM_ITEMS + 1 if code == "e4srec" else NUM_ITEMS
        self.input_embeds = nn.Embedding.from_pretrained(torch.randn(rows, DIM))
        self.input_proj = nn.Linear(DIM, HIDDEN)
        self.score = nn.Linear(HIDDEN, rows if code == "e4srec" else DIM, bias=False)
        with torch.no_grad():
            for name, value in self.named_parameters():
                if "lora_B" in name:
                    value.copy_(torch.randn_like(value) / 20)
        tokenizer = AutoTokenizer.from_pretrained(backbone)
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (INSTRUCTION, RESPONSE)]
        self.instruction, self.response = (torch.tensor(ids) for ids in texts)
        self.code = code
        self.eval()

    @torch.inference_mode()
    def scores(self, rows):
        """Scores of all table rows for one user, who has these table rows in the past, oldest first."""
        if self.code == "e4srec":
            rows = torch.tensor(rows)
            mask = torch.ones_like(rows)
        else:
            rows = torch.tensor(([0] * 30 + list(rows))[-30:])
            mask = (rows > 0).long()
        words = self.llama_model.get_input_embeddings()
        items = self.input_proj(self.input_embeds(rows))
        states = torch.cat([words(self.instruction), items, words(self.response)])
        seen = torch.cat([torch.ones_like(self.instruction), mask, torch.ones_like(self.response)])
        output = self.llama_model(inputs_embeds=states[None], attention_mask=seen[None])
        user = self.score(output.last_hidden_state[0, -1])
        return user if self.code == "e4srec" else self.input_embeds.weight @ user


def write_final(folder, model, *, safe=True, table="SASRec_item_embed.pkl"):
    """What E4SRec's training ends with: a PEFT adapter, adapter.pth, and the item table put beside them."""
    model.llama_model.save_pretrained(folder, safe_serialization=safe)
    assert (folder / f"adapter_model.{'safetensors' if safe else 'bin'}").is_file()
    heads = {"input_proj": model.input_proj.state_dict(), "score": model.score.state_dict()}
    torch.save(heads, folder / "adapter.pth")
    (folder / table).write_bytes(pickle.dumps(model.input_embeds.weight.data))
    torch.save({}, folder / "pytorch_model.bin")
    return folder


def old_names(state):
    """Names before PEFT 0.6: no base_layer, no adapter name."""
    return {name.replace(".base_layer.", ".").replace(".default.", "."): value for name, value in state.items()}


def in_8_bits(state):
    """Base weights as bitsandbytes saves them; what they are worth is the backbone's business."""
    state = dict(state)
    for name in [name for name in state if "_proj" in name and "lora" not in name and "layers" in name]:
        weight = state[name]
        scale = weight.abs().amax(dim=1)
        state[name] = (weight / scale[:, None] * 127).round().to(torch.int8)
        stem = name.removesuffix("weight")
        state |= {f"{stem}SCB": scale, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return state


def write_trainer(folder, state, *, safe=True):
    """What the Trainers of both codes save: one state dict, and files that must never be opened."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().clone().contiguous() for name, value in state.items()}
    if safe:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Explosive(str(folder / "canary"))))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    return folder


class Explosive:
    """Unpickling it writes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (self.canary, "w")
