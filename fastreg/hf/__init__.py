"""Hugging Face: `Trainer`, and loops of accelerate.

`FastregTrainer` needs one line for all regularizers:

```python
trainer = FastregTrainer(model, args, train_dataset=data, recipe={"sam": 0.05, "ema": 0.999})
trainer.train()
```

Loops of accelerate take the optimizers as they are.  The step clips, in place of
`accelerator.clip_grad_norm_`; averages are evaluated and saved between `optimizer.eval()` and
`optimizer.train()`:

```python
accelerator = Accelerator(gradient_accumulation_steps=2)
optimizer = fastreg.AdamW(
    model.parameters(), lr=1e-3, regularizers=[fastreg.ClipNorm(1.0), fastreg.EMA(0.999)]
)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

optimizer.eval()
evaluate(model)
accelerator.save_state(folder)  # load_state(folder) and optimizer.train() go on from here, bit for bit
optimizer.train()
```

accelerate hides the methods of SAM besides `step`; the optimizer itself is `optimizer.optimizer`:

```python
accelerator = Accelerator()
optimizer = fastreg.SAM(
    model.parameters(), fastreg.AdamW, rho=0.05, lr=1e-3, regularizers=[fastreg.ClipNorm(1.0)]
)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for batch in loader:
    accelerator.backward(model(**batch).loss)
    optimizer.optimizer.first_step(zero_grad=True)
    accelerator.backward(model(**batch).loss)
    optimizer.step()  # by way of the scaler, if there is one
    optimizer.zero_grad()
```
"""

try:
    import accelerate as _accelerate  # type: ignore[import-untyped]  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError("fastreg.hf needs transformers and accelerate: pip install 'fastreg[hf]'") from error

from .callbacks import EmbeddingNoiseCallback, ScheduleCallback
from .trainer import FastregTrainer, FastregTrainerMixin

__all__ = ["EmbeddingNoiseCallback", "FastregTrainer", "FastregTrainerMixin", "ScheduleCallback"]
