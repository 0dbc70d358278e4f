"""Models of many kinds, as libraries have them or as people write them: what `bench_zoo` trains.

Each entry makes, on a device, a model, its batches, and the loss of the model on one of these. Weights are random, and images and
words, too. `small` is for a test on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo_models import Recommender, UNet, WordModel

Loss = Callable[..., Tensor]
Made = tuple[nn.Module, list[tuple[Tensor, ...]], Loss]
N_BATCHES = 3


def batches(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Some batches, which steps take in turn."""
    return [make() for _ in range(N_BATCHES)]


def words(device: torch.device, vocabulary: int, *shape: int) -> Tensor:
    """Random words."""
    return torch.randint(vocabulary, shape, device=device)


def images(name: str, batch: int = 64, **options: Any) -> Callable[[torch.device], Made]:
    """One of timm's image models, at 224 x 224."""

    def make(device: torch.device) -> Made:
        import timm

        model = timm.create_model(name, num_classes=1000, **options).to(device).train()
        take = lambda: (torch.randn(batch, 3, 224, 224, device=device), words(device, 1000, batch))  # noqa: E731
        return model, batches(take), lambda model, x, y: F.cross_entropy(model(x), y)

    return make


def language(config: str, model: str, batch: int, length: int, vocabulary: int, **sizes: Any) -> Callable[[torch.device], Made]:
    """One of transformers' models, which predicts its own words."""

    def make(device: torch.device) -> Made:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**sizes)).to(device).train()
        take = lambda: (words(device, vocabulary, batch, length),)  # noqa: E731
        return made, batches(take), lambda model, x: model(input_ids=x, labels=x).loss

    return make


def translation(device: torch.device) -> Made:
    """T5-small, of 512 words into 128."""
    import transformers

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0)).to(device).train()
    take = lambda: (words(device, 32000, 16, 512), words(device, 32000, 16, 128))  # noqa: E731
    return model, batches(take), lambda model, x, y: model(input_ids=x, labels=y).loss


def segmentation(device: torch.device) -> Made:
    """DeepLab v3 on a ResNet-50, with its second head."""
    from torchvision.models.segmentation import deeplabv3_resnet50

    model = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True).to(device).train()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        return F.cross_entropy(out["out"], y) + 0.4 * F.cross_entropy(out["aux"], y)

    return model, batches(lambda: (torch.randn(16, 3, 256, 256, device=device), words(device, 21, 16, 256, 256))), loss


def recurrent(device: torch.device, batch: int = 64, length: int = 128) -> Made:
    """A language model of two LSTMs."""
    model = WordModel().to(device).train()
    take = lambda: (words(device, WordModel.WORDS, batch, length), words(device, WordModel.WORDS, batch, length))  # noqa: E731
    return model, batches(take), lambda model, x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def diffusion(device: torch.device, batch: int = 64) -> Made:
    """A U-Net that finds the noise in images of 32 x 32."""
    model = UNet().to(device).train()
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=device), 0)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        times, noise = torch.randint(1000, (len(x),), device=device), torch.randn_like(x)
        share = kept[times][:, None, None, None]
        return F.mse_loss(model(share.sqrt() * x + (1 - share).sqrt() * noise, times.float()), noise)

    return model, batches(lambda: (torch.randn(batch, 3, 32, 32, device=device),)), loss


def recommendation(device: torch.device, batch: int = 2048) -> Made:
    """26 tables and the products of what is found in them (DLRM)."""
    model = Recommender().to(device).train()

    def take() -> tuple[Tensor, ...]:
        numbers, clicked = torch.randn(batch, Recommender.NUMBERS, device=device), torch.rand(batch, device=device).round()
        return numbers, words(device, Recommender.ROWS, batch, Recommender.TABLES), clicked

    return model, batches(take), lambda model, x, rows, y: F.binary_cross_entropy_with_logits(model(x, rows), y)


def encoder_decoder(device: torch.device, batch: int = 32, length: int = 64, vocabulary: int = 8000, width: int = 512) -> Made:
    """torch's own transformer, with a causal mask."""
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(vocabulary, width),
            "body": nn.Transformer(width, 8, 4, 4, 4 * width, 0.1, batch_first=True),
            "head": nn.Linear(width, vocabulary),
        }
    )
    mask = nn.Transformer.generate_square_subsequent_mask(length).to(device)

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        out = model["head"](model["body"](model["words"](x), model["words"](y), tgt_mask=mask))
        return F.cross_entropy(out.flatten(0, 1), y.flatten(), label_smoothing=0.1)

    take = lambda: (words(device, vocabulary, batch, length), words(device, vocabulary, batch, length))  # noqa: E731
    return model.to(device).train(), batches(take), loss


LLAMA = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 32000}
EXPERTS = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 64,
}
ROBERTA = {"num_hidden_layers": 6, "max_position_embeddings": 520}
ZOO: dict[str, Callable[[torch.device], Made]] = {
    "efficientnet_b0": images("efficientnet_b0", 128),
    "mobilenetv3_large": images("mobilenetv3_large_100", 128),
    "densenet121": images("densenet121"),
    "regnety_016": images("regnety_016"),
    "vgg16_bn": images("vgg16_bn", 32),
    "convnext_tiny": images("convnext_tiny", drop_path_rate=0.1),
    "swin_tiny": images("swin_tiny_patch4_window7_224"),
    "mixer_b16": images("mixer_b16_224"),
    "deit3_small": images("deit3_small_patch16_224", drop_path_rate=0.05),
    "deeplabv3": segmentation,
    "llama": language("LlamaConfig", "LlamaForCausalLM", 8, 1024, 32000, **LLAMA),
    "qwen3_moe": language("Qwen3MoeConfig", "Qwen3MoeForCausalLM", 8, 512, 16000, **EXPERTS),
    "distilbert": language("DistilBertConfig", "DistilBertForMaskedLM", 32, 256, 30000),
    "roberta": language("RobertaConfig", "RobertaForMaskedLM", 16, 256, 50000, **ROBERTA),
    "t5_small": translation,
    "transformer": encoder_decoder,
    "lstm": recurrent,
    "diffusion_unet": diffusion,
    "dlrm": recommendation,
}
