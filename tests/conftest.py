"""Shapes are checked in every test run, and tiny models that all tests share."""

import jaxtyping

jaxtyping.install_import_hook(["slmrec", "compress", "export"], "shape_checks.checked")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model():
    """Make a random decoder recommender: `tiny_model(family="qwen3", prompt="slmrec", num_layers=2)`."""
    import torch
    from transformers import AutoConfig

    from slmrec.config import RecipeConfig
    from slmrec.models.decoder import DecoderModel, DecoderSpec, decoder_settings

    def make(family="llama", num_layers=3, num_items=20, intermediate_size=64, sliding_window=None, **recipe):
        sliding = {} if sliding_window is None else {"sliding_window": sliding_window}
        if sliding and family.startswith("qwen"):
            sliding |= {"use_sliding_window": True, "max_window_layers": 1}  # the first layer sees all
        config = AutoConfig.for_model(
            family, hidden_size=32, intermediate_size=intermediate_size, num_hidden_layers=num_layers,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=50, head_dim=8, initializer_range=0.2,
            max_position_embeddings=128, **sliding,
        )  # fmt: skip
        settings = RecipeConfig(**{"supervision": "last", "dropout": 0.0} | recipe)
        torch.manual_seed(0)
        spec = DecoderSpec(
            decoder=decoder_settings(config, num_layers), recipe=settings, num_items=num_items, item_dim=8,
            max_history=10, prefix_length=0 if settings.prompt == "none" else 5,
            suffix_length=3 if settings.prompt == "slmrec" else 0, has_titles=False, backbone="random",
        )  # fmt: skip
        model = DecoderModel(spec)
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if "decoder" not in name:
                    value.copy_(torch.randn_like(value) / 2)
        return model

    return make


@pytest.fixture(scope="session")
def from_one(tmp_path_factory):
    """Runs with a dataset whose external ids are 1..20."""
    from imported import write_data
    from published import NUM_ITEMS

    return write_data(tmp_path_factory.mktemp("one"), list(range(1, NUM_ITEMS + 1)))


@pytest.fixture(scope="session")
def from_zero(tmp_path_factory):
    """Runs with a dataset whose external ids are 0..19."""
    from imported import write_data
    from published import NUM_ITEMS

    return write_data(tmp_path_factory.mktemp("zero"), list(range(NUM_ITEMS)))


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """The folder of a small random LLaMA with a tokenizer."""
    from published import write_backbone

    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def e4srec(backbone):
    """A teacher as the E4SRec code trains it."""
    from published import Published

    return Published(backbone, "e4srec")


@pytest.fixture(scope="session")
def slmrec(backbone):
    """A teacher as the SLMRec code trains it."""
    from published import Published

    return Published(backbone, "slmrec")


@pytest.fixture
def teacher(tiny_model):
    """Four layers to distil from."""
    return tiny_model(num_layers=4, prompt="none").eval()


@pytest.fixture
def samples():
    """Every position of a few short sequences."""
    from distilling import SEQUENCES

    from slmrec.config import WindowConfig
    from slmrec.samples import training_samples

    return training_samples(SEQUENCES, WindowConfig(max_history=4), "all", after_suffix=False)
