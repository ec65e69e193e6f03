"""What the ranks of test_distributed.py run: processes that stay, and the jobs that they are sent."""

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from conftest import make_model
from sentence_transformers import SentenceTransformer
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.models.modernbert import modeling_modernbert

from hf_densefeat import DenseTrainer, DenseTrainingArguments
from hf_densefeat.data.sampling import PairBatchSampler
from hf_densefeat.objective import distributed
from hf_densefeat.objective.moments import PairGradient
from hf_densefeat.training.sentence_loss import DenseLoss

LR = 0.001
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ModernBertEncoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


class Ranks:
    """A pool of processes; `run` gives each of the first `ranks` of them the same job and returns their answers."""

    def __init__(self, most: int):
        self.most = most
        self.start()

    def start(self) -> None:
        """Start the processes."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, not once a process
        tests, root = str(Path(__file__).parent), str(Path(__file__).parents[1])
        path = os.pathsep.join([tests, root, os.environ.get("PYTHONPATH", "")])
        with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"):
            self.pipes, self.processes = [], []
            for _ in range(self.most):
                ours, theirs = context.Pipe()
                self.pipes.append(ours)
                self.processes.append(context.Process(target=serve, args=(theirs,), daemon=True))
                self.processes[-1].start()

    def run(self, job, ranks: int, timeout: float = 300, **kwargs) -> list:
        """The answers of all ranks; RuntimeError with the tracebacks if one failed, or none answers in time."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank, pipe in enumerate(self.pipes[:ranks]):
            pipe.send((job, rank, ranks, port, kwargs))
        answers, waiting = {}, self.pipes[:ranks]
        while waiting:
            ready = multiprocessing.connection.wait(waiting, timeout)
            answers |= {pipe: pipe.recv() for pipe in ready}
            failed = [answer for answer in answers.values() if isinstance(answer, Failure)]
            if failed or not ready:  # the other ranks would wait for it for ever
                self.stop()
                self.start()
                raise RuntimeError("\n".join(answer.text for answer in failed) or f"{job.__name__} hangs.")
            waiting = [pipe for pipe in waiting if pipe not in answers]
        return [answers[pipe] for pipe in self.pipes[:ranks]]

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


class Failure:
    """The traceback of a rank."""

    def __init__(self, text: str):
        self.text = text


def serve(pipe) -> None:
    """Answer jobs until the pipe closes. Each has its own process group, as if the process had just been launched."""
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage at each start: not what was imported
    while True:
        try:
            job, rank, ranks, port, kwargs = pipe.recv()
        except EOFError:
            sys.exit()
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in launched.items()} if ranks > 1 else {}
        with mock.patch.dict(os.environ, environment | kwargs.pop("environment", {})), shard_on_cpu():
            try:
                pipe.send(job(**kwargs))
            except Exception:
                pipe.send(Failure(traceback.format_exc()))
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()
                if dist.is_initialized():
                    dist.destroy_process_group()


# ---- Jobs ----------------------------------------------------------------------------------------------------------


def train(
    folder,
    tokenizer,
    data,
    family="bert",
    dtype=torch.float32,
    model=None,
    cut=None,
    change=None,
    poison=None,
    resume=None,
    evaluation=None,
    evaluator=None,
    encode=None,
    save=None,
    peft_config=None,
    objective=None,
    **arguments,
) -> dict:
    """Train, and say what happened on this rank.

    Args:
        cut: pairs of each rank in each micro-batch of an update, [[2, 0], [1, 5]], instead of the sampler's even cut.
        change: name of a mutation of `MUTATIONS`.
        poison: (rank, update) whose first embedding is NaN.
    """
    args = DenseTrainingArguments(
        output_dir=folder,
        optim=arguments.pop("optim", "sgd"),
        learning_rate=arguments.pop("learning_rate", LR),
        lr_scheduler_type="constant",
        max_grad_norm=arguments.pop("max_grad_norm", 0.0),
        logging_steps=arguments.pop("logging_steps", 1),
        save_strategy=arguments.pop("save_strategy", "no"),
        report_to="none",
        disable_tqdm=True,
        **{"lambda_pair": 0.0} | arguments,
    )
    trainer = _Trainer(
        varied_model(family, tokenizer, dtype, **model or {}),
        args,
        train_dataset=data,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        evaluator=evaluator,
        peft_config=peft_config,
        objective=objective,
    )
    trainer.cut, trainer.poison = cut, poison
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    with MUTATIONS[change]() if change else contextlib.nullcontext(), recorder.collectives(), rotary_in(dtype):
        trainer.train(resume_from_checkpoint=resume)
    answer = {
        "gradients": recorder.gradients,
        "random": recorder.random,
        "collectives": recorder.calls,
        "weights": _whole(trainer.model.named_parameters()),
        "state": trainer.objective.state_dict(),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "steps": trainer.state.global_step,
        "skipped": trainer.update_log.skipped,
        "wrapper": type(trainer.model_wrapped).__name__,
        "graphs": recorder.graphs,
        "graph_breaks": dict(counters["graph_break"]),
    }
    if evaluation is not None:
        answer["metrics"] = trainer.evaluate()
    if encode is not None:
        answer["encoded"] = trainer.dense_model.encode(encode, tokenizer)
    if save is not None:
        trainer.save_model(save)
    return answer


def gradient_of_dense_loss(folder, texts, cuts) -> dict:
    """Of this rank's rows of two columns of texts: from one cut to the next; averaged over the ranks as DDP does."""
    rank, ranks = int(os.environ.get("RANK", 0)), len(cuts)
    if ranks > 1:
        dist.init_process_group("gloo")
    rows = slice((0, *cuts)[rank], cuts[rank])
    model = SentenceTransformer(folder, device="cpu").double()
    loss = DenseLoss(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in loss.start[0].parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    values = loss([model.preprocess(side[rows]) for side in texts])
    sum(values.values()).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    for gradient in gradients.values() if ranks > 1 else ():
        dist.all_reduce(gradient)
        gradient /= ranks
    return gradients


def varied_model(family, tokenizer, dtype, dropout=0.0, **kwargs):
    """A tiny model with weights so wide that notes differ as those of a trained model do."""
    model = make_model(family, tokenizer, dropout, **kwargs).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 15
    return model


def rotary_in(dtype):
    """ModernBERT rotates queries and keys in float32, whatever the model's dtype: in float64 it must not."""
    if dtype != torch.float64:
        return contextlib.nullcontext()

    def rotate(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        half = modeling_modernbert.rotate_half
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    return mock.patch.object(modeling_modernbert, "apply_rotary_pos_emb", rotate)


def shard_on_cpu():
    """Accelerate leaves FSDP to accelerators; FSDP2 itself works with gloo."""
    real = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    return mock.patch.object(AcceleratorState, "__init__", init)


class _Trainer(DenseTrainer):
    def get_train_dataloader(self):
        if self.cut is None:
            return super().get_train_dataloader()
        data, mine = self.train_dataset, []
        for batch in PairBatchSampler(
            data.pairs, data.lengths, sum(map(sum, self.cut)), seed=self.args.seed, spread_patients=self.args.unbiased
        ):
            for counts in self.cut:
                before = sum(counts[: self.args.process_index])
                mine.append(batch[before : before + counts[self.args.process_index]])
                batch = batch[sum(counts) :]
        return DataLoader(data, batch_sampler=mine, collate_fn=self.data_collator)

    def embed_pairs(self, model, inputs, **options):
        made = super().embed_pairs(model, inputs, **options)
        if self.poison == (self.args.process_index, self.state.global_step + 1) and len(made.z_a):
            nan = torch.tensor([[torch.nan]] + [[1.0]] * (len(made.z_a) - 1))
            return made._replace(z_a=made.z_a * nan)
        return made


class Recorder(TrainerCallback):
    """Gradients of every update as the optimizer gets them, and the collectives that Python code asks for."""

    def __init__(self, trainer):
        self.trainer, self.gradients, self.random, self.calls = trainer, [], [], [[]]
        self.graphs = []
        counters.clear()

    def on_step_begin(self, args, state, control, **kwargs):
        self.random.append(torch.get_rng_state())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameters = self.trainer.model.named_parameters()
        with mock.patch.object(self, "calls", [[]]):
            self.gradients.append(_whole((name, p.grad) for name, p in parameters if p.grad is not None))
        self.calls.append([])

    def on_step_end(self, args, state, control, **kwargs):
        self.graphs.append(counters["stats"]["unique_graphs"])

    @contextlib.contextmanager
    def collectives(self):
        """Inside, `calls[i]` lists (name, bytes) of the collectives before update i."""
        with contextlib.ExitStack() as stack:
            for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "all_gather_object"):
                stack.enter_context(mock.patch.object(dist, name, self._counted(name, getattr(dist, name))))
            yield

    def _counted(self, name, function):
        def call(tensor, *args, **kwargs):
            size = tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
            self.calls[-1].append((name, size))
            return function(tensor, *args, **kwargs)

        return call


def _whole(named) -> dict:
    tensors = ((name.removeprefix("_orig_mod."), tensor.detach()) for name, tensor in named)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors}


# ---- Mutations: the field's four common mistakes, each of which the comparison of gradients must see ----------------


def _all_reduce(after):
    real = dist.all_reduce
    return mock.patch.object(distributed.dist, "all_reduce", lambda tensor, *args: after(real, tensor, *args))


def _dropped(real, tensor, *args):
    real(tensor.clone(), *args)


def _averaged(real, tensor, *args):
    real(tensor, *args)
    tensor /= dist.get_world_size()


def _gathered_without_scale():
    """The gradient of a gather that lets only the own slot through: 1 / world size of the dense gradient."""
    real = PairGradient.pullback
    scaled = lambda self, *sides: [g / dist.get_world_size() for g in real(self, *sides)]  # noqa: E731
    return mock.patch.object(PairGradient, "pullback", scaled)


def _world_size_lost():
    real = DenseTrainer.compute_loss

    def loss(self, *args, **kwargs):
        return real(self, *args, **kwargs) / self.args.world_size

    return mock.patch.object(DenseTrainer, "compute_loss", loss)


MUTATIONS = {
    "result of the all-reduce dropped": lambda: _all_reduce(_dropped),
    "mean instead of sum of counts": lambda: _all_reduce(_averaged),
    "gather without scale": _gathered_without_scale,
    "world size lost": _world_size_lost,
}
