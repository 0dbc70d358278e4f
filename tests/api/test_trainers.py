"""The trainers of other libraries, given the wrapper for an optimizer: resumed in mid-run they end where they would have."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitsune
from kitsune import KitsuneOptimizer
from tests.api.training import batches, small_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, HALF_WAY = 12, 6
WRAPS = {"plain": lambda o: o, "kitsune": lambda o: KitsuneOptimizer(o), "amp": lambda o: KitsuneOptimizer(o, enable_amp=True)}
# Libraries warn of each other's versions.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def library(name: str) -> Any:
    """An installed library; one that is not, or is broken, is a reason to skip."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def same(expected: nn.Module, got: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(expected.state_dict().values(), got.state_dict().values(), strict=True))


# transformers


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        words = torch.randint(0, 60, (12,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}


def with_transformers(folder: Path, wrap: Any, resume: str | None = None, steps: int = STEPS) -> nn.Module:
    library("accelerate")
    transformers, bert = library("transformers"), library("transformers.models.bert.modeling_bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = bert.BertForMaskedLM(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=HALF_WAY,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        gradient_accumulation_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=False,
        logging_steps=3,
        save_strategy="steps",
    )
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences(), optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("name", WRAPS)
def test_transformers_trainer_resumes_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    kitsune.reset()
    whole = with_transformers(tmp_path / "whole", WRAPS[name])
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{HALF_WAY}")
    resumed = with_transformers(tmp_path / "resumed", WRAPS[name], resume=checkpoint)
    assert same(whole, resumed)
    if name == "kitsune":
        counters = kitsune.counters()
        assert counters["recorded"] > 0 and counters["recognised"] > STEPS / 2
        if DEVICE == "cpu":
            assert same(with_transformers(tmp_path / "plain", WRAPS["plain"]), whole)
    shutil.rmtree(tmp_path)


# lightning


def with_lightning(folder: Path, wrap: Any, resume: str | None = None, steps: int = STEPS) -> nn.Module:
    lightning = library("lightning")

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_model()

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def configure_optimizers(self) -> Any:
            optimizer = wrap(torch.optim.AdamW(self.parameters(), lr=0.01))
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    model = Model()
    saving = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, save_on_train_epoch_end=True)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator=DEVICE,
        devices=1,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # One batch again and again: where in its data a run goes on is the library's affair.
    trainer.fit(model, torch.utils.data.DataLoader(batches(1) * HALF_WAY, batch_size=None), ckpt_path=resume)
    return model.cpu()


@pytest.mark.parametrize("name", WRAPS)
def test_lightning_trainer_resumes_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    kitsune.reset()
    whole = with_lightning(tmp_path, WRAPS[name])
    (checkpoint,) = tmp_path.glob(f"*step={HALF_WAY}.ckpt")
    assert same(whole, with_lightning(tmp_path / "again", WRAPS[name], resume=str(checkpoint)))
    if name == "kitsune":
        assert kitsune.counters()["recorded"] > 0
        if DEVICE == "cpu":
            assert same(with_lightning(tmp_path / "plain", WRAPS["plain"]), whole)


# A plain loop


def with_a_loop(folder: Path, wrap: Any, resume: bool = False, steps: int = STEPS) -> nn.Module:
    model = nn.Sequential(small_model(), nn.Dropout(0.2)).to(DEVICE)
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=0.01))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = 0
    torch.manual_seed(7)
    if resume:
        saved = torch.load(folder / "half.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["random"])
        if DEVICE == "cuda":
            torch.cuda.set_rng_state(saved["cuda"])
        start = HALF_WAY
    for k, (x, y) in list(enumerate(batches(steps)))[start:]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(DEVICE)), y.to(DEVICE)).backward()
        optimizer.step()
        scheduler.step()
        if k + 1 == HALF_WAY:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            saved["cuda"] = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.empty(0)
            torch.save({**saved, "random": torch.get_rng_state()}, folder / "half.pt")
    return model


@pytest.mark.parametrize("name", WRAPS)
def test_a_loop_resumes_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    whole = with_a_loop(tmp_path, WRAPS[name])
    assert same(whole, with_a_loop(tmp_path, WRAPS[name], resume=True))
    if name == "kitsune" and DEVICE == "cpu":
        assert same(with_a_loop(tmp_path, WRAPS["plain"]), whole)
