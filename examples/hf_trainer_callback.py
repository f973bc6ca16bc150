"""Pruning under a Hugging Face Trainer: a callback that prunes little by little and keeps the masks.

    pip install "transformers[torch]"
    python examples/hf_trainer_callback.py README.md --density 0.2 --steps 300

The model is a small GPT-2 on the bytes of a text file, made from a configuration: nothing is downloaded. Put your own in its
place; the callback needs no more than a model with linear layers. Checkpoints that the Trainer writes hold the masks.
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import sparselottery as sl


class Prune(TrainerCallback):
    """Prunes the model that is trained to `density`, along a cubic schedule (Zhu & Gupta, arXiv 1710.01878).

    Once masked, weights are exactly zero in every forward pass and after every step, whatever optimizer the Trainer uses.
    """

    def __init__(self, density, begin=0.1, end=0.7, every=0.02, **options):
        self.schedule = sl.Gradual(density=density, begin=begin, end=end, every=every, options=options)
        self.steps = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        sl.sparsify(model)
        self.steps = self.schedule.over(state.max_steps)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.steps(model, state.global_step, getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is not None and "loss" in logs:
            layers = [layer.mask for _, layer in sl.pruning.masked_modules(model)]
            logs["density"] = sum(mask.count for mask in layers) / sum(mask.numel for mask in layers)


class Windows(torch.utils.data.Dataset):
    def __init__(self, text, context):
        self.bytes, self.context = torch.tensor(list(text)), context

    def __len__(self):
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, i):
        window = self.bytes[i * self.context : (i + 1) * self.context]
        return {"input_ids": window, "labels": window}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--folder", default="hf-run", help="where the Trainer writes")
    parser.add_argument(
        "--out", default="gpt2.safetensors", help="where the ticket goes: the masks and the initial weights"
    )
    arguments = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"n_embd": arguments.width, "n_layer": 2, "n_head": 4, "n_positions": arguments.context}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **sizes))
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.folder,
            max_steps=arguments.steps,
            learning_rate=2e-3,
            per_device_train_batch_size=16,
            logging_steps=max(1, arguments.steps // 10),
            save_steps=arguments.steps,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Windows(arguments.text.read_bytes(), arguments.context),
        callbacks=[Prune(arguments.density)],
    )
    trainer.train()
    ticket = sl.Ticket.of(model, initial)
    print(f"{ticket.count} of {ticket.total} weights: {ticket.save(arguments.out)}")


if __name__ == "__main__":
    main()
