"""Lightning."""

import pytest
import torch

from cases import assert_equal, weights
from slimstate.optim import create, in_backward
from small import batch, llama, sentences

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


class Module(lightning.LightningModule):
    def __init__(self, name, per_layer=False, dtype=torch.float32):
        super().__init__()
        self.model = llama(dtype)
        self.name, self.per_layer = name, per_layer

    def training_step(self, batch):
        return self.model(**batch).loss

    def configure_optimizers(self):
        optimizer = create(self.name, self.model, lr=1e-2, decay="matrices")
        if self.per_layer:
            in_backward(optimizer, 0.5, early_bases=True)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Counting(Module):
    """Its batches go by the step: Lightning begins an epoch with the same batch twice after it has resumed."""

    def training_step(self, _):
        return super().training_step(batch(self.global_step))


def fitted(module, folder, steps, resume=None, epoch=8, **settings):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False} | settings,
    )
    data = torch.utils.data.DataLoader(sentences(4 * epoch), batch_size=4)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_fit_is_the_plain_loop(per_layer, tmp_path):
    """With a closure, accumulation, clipping and a schedule."""
    module = Module("galore_adamw", per_layer)
    clip = {} if per_layer else {"gradient_clip_val": 0.5}
    fitted(module, tmp_path, 4, accumulate_grad_batches=2, **clip)
    model = llama()
    optimizer = create("galore_adamw", model, lr=1e-2, decay="matrices")
    if per_layer:
        in_backward(optimizer, 0.5, early_bases=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for i in range(0, 8, 2):
        for j in (i, i + 1):
            (model(**batch(j)).loss / 2).backward()
        if not per_layer:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            assert torch.nn.utils.clip_grad_norm_(params, 0.5) > 0.5
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_equal(weights(module.model), weights(model))
    assert module.optimizers().param_groups[0]["lr"] == 1e-2 / 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("galore_adamw_8bit", torch.float32),
        ("frugal", torch.bfloat16),
        pytest.param("adamw", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("dct_adamw", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_a_fit_goes_on_from_a_checkpoint_as_if_nothing_had_happened(name, dtype, tmp_path):
    modules, trainers = [Counting(name, dtype=dtype), Counting(name, dtype=dtype)], []
    for module, resume in zip(modules, (None, tmp_path / "epoch=0.ckpt"), strict=True):
        saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainers.append(fitted(module, tmp_path, 6, resume, 3, enable_checkpointing=True, callbacks=[saving]))
        torch.default_generator.manual_seed(7)
    whole, resumed = (trainer.optimizers[0] for trainer in trainers)
    assert {trainer.global_step for trainer in trainers} == {6}
    assert_equal(weights(modules[0]), weights(modules[1]))
    assert_equal(whole.state_dict(), resumed.state_dict())


def test_the_per_layer_mode_is_refused_where_lightning_clips(tmp_path):
    module = Module("galore_adamw", per_layer=True)
    before = weights(module)
    with pytest.raises(RuntimeError, match="was changed after the backward pass"):
        fitted(module, tmp_path, 1, gradient_clip_val=0.5)
    assert_equal(before, weights(module))
