"""Small models of public packages, each with its usual training loss.

An entry is a function without arguments that returns the arguments of ``Problem.from_module``: the model, the
criterion, the inputs, the targets, and options.  Nothing is adapted for this library: the arguments are those that a
package's own example would pass to a training loop.  Packages are imported inside the functions, so that a missing
package affects only its own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOUBLE = torch.float64


@dataclass(frozen=True)
class Given:
    """The arguments of ``Problem.from_module``."""

    model: nn.Module
    criterion: Callable[..., Tensor] | None
    inputs: Any
    targets: Any = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A model by its package (pip's name) and its own name, and the reference for its derivatives."""

    package: str
    name: str
    make: Callable[[], Given]
    reference: Callable[[], Given]


ENTRIES: list[Entry] = []


def entry(
    package: str, name: str, reference: Callable[[], Given] | None = None
) -> Callable[[Callable[[], Given]], Callable[[], Given]]:
    """Register a model; the gradients of ``reference``, or its own, give the differences for comparison."""

    def register(make: Callable[[], Given]) -> Callable[[], Given]:
        ENTRIES.append(Entry(package, name, make, reference or make))
        return make

    return register


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def tokens(*shape: int, vocabulary: int, seed: int = 2, least: int = 0) -> Tensor:
    return torch.randint(least, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token: logits [n, length, vocabulary], targets [n, length]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of every next token: logits [n, length, vocabulary], ids [n, length]."""
    return token_loss(logits[:, :-1], ids[:, 1:])


# torch itself


@entry("torch", "TransformerEncoder")
def _() -> Given:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    return Given(model, nn.MSELoss(), normal(6, 5, 16), normal(6, 5, 16, seed=3))


@entry("torch", "MultiheadAttention")
def _() -> Given:
    x = normal(6, 5, 16)
    options = {"output": 0}
    return Given(
        nn.MultiheadAttention(16, 4, batch_first=True).double(),
        nn.MSELoss(),
        (x, x, x),
        normal(6, 5, 16, seed=3),
        options,
    )


@entry("torch", "LSTM, two layers")
def _() -> Given:
    model = nn.LSTM(6, 12, num_layers=2, batch_first=True).double()
    return Given(model, nn.MSELoss(), normal(8, 7, 6), normal(8, 7, 12, seed=3).tanh(), {"output": 0})


@entry("torch", "GRU, bidirectional")
def _() -> Given:
    model = nn.GRU(6, 10, batch_first=True, bidirectional=True).double()
    return Given(model, nn.MSELoss(), normal(8, 7, 6), normal(8, 7, 20, seed=3).tanh(), {"output": 0})


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut that pads channels (He et al. 2016, option A)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.extra = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(out + shortcut)


class ResNet20(nn.Module):
    """The network for CIFAR of He et al. 2016, section 4.2, with n = 3; the literature's width is 16."""

    def __init__(self, width: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width] * 3 + [2 * width] * 3 + [4 * width] * 3
        pairs = zip([width, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*[Block(a, b, 1 if a == b else 2) for a, b in pairs])
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@entry("torch", "ResNet-20, width 4, in training mode")
def _() -> Given:
    return Given(ResNet20().double(), nn.CrossEntropyLoss(), normal(8, 3, 16, 16), tokens(8, vocabulary=10))


@entry("torch", "ResNet-20, width 4")
def _() -> Given:
    return Given(ResNet20().double().eval(), nn.CrossEntropyLoss(), normal(8, 3, 16, 16), tokens(8, vocabulary=10))


@entry("torch", "CNN with GroupNorm")
def _() -> Given:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10)).double()
    return Given(model, nn.CrossEntropyLoss(), normal(8, 3, 12, 12), tokens(8, vocabulary=10))


class PINN(nn.Module):
    """Residual of −u″ = π² sin(πx) with u a network: the derivative of u is taken inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        u = x * (1 - x) * self.u(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return u, ddu + torch.pi**2 * torch.sin(torch.pi * x)


@entry("torch", "PINN, Poisson, autograd.grad in forward")
def _() -> Given:
    x = torch.linspace(0, 1, 16, dtype=DOUBLE)[:, None]
    return Given(PINN().double(), lambda outputs: outputs[1].square().mean(), x)


# transformers


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


@entry("transformers", "GPT-2, tied")
def _() -> Given:
    ids = tokens(4, 10, vocabulary=61)
    return Given(_gpt2().double(), next_token_loss, {"input_ids": ids}, ids, {"output": "logits"})


@entry("transformers", "GPT-2, tied, loss of its own")
def _() -> Given:
    ids = tokens(4, 10, vocabulary=61)
    return Given(_gpt2().double(), None, {"input_ids": ids, "labels": ids})


@entry("transformers", "GPT-2, tied, loss of its own, float32")
def _() -> Given:
    ids = tokens(4, 10, vocabulary=61)
    return Given(_gpt2(), None, {"input_ids": ids, "labels": ids})


def _checkpointed(reentrant: bool) -> Given:
    model = _gpt2().double().train()  # blocks are checkpointed in training mode only
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens(4, 10, vocabulary=61)
    return Given(model, next_token_loss, {"input_ids": ids, "use_cache": False}, ids, {"output": "logits"})


@entry("transformers", "GPT-2, gradient checkpointing")
def _() -> Given:
    return _checkpointed(reentrant=False)


@entry("transformers", "GPT-2, gradient checkpointing, reentrant")
def _() -> Given:
    return _checkpointed(reentrant=True)


def _bert(padded: bool) -> Given:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    ids = tokens(4, 10, vocabulary=61, least=1)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 7:], ids[0, 7:] = 0, config.pad_token_id
    labels = tokens(4, 10, vocabulary=61, seed=3)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Given(BertForMaskedLM(config).double().eval(), token_loss, inputs, labels, {"output": "logits"})


@entry("transformers", "BERT, masked tokens")
def _() -> Given:
    return _bert(padded=False)


@entry("transformers", "BERT, masked tokens, padding")
def _() -> Given:
    return _bert(padded=True)


@entry("transformers", "ViT")
def _() -> Given:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    model = ViTForImageClassification(config).double().eval()
    return Given(model, nn.CrossEntropyLoss(), normal(6, 3, 16, 16), tokens(6, vocabulary=5), {"output": "logits"})


def _llama(dtype: torch.dtype) -> Given:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    ids = tokens(4, 10, vocabulary=61)
    model = LlamaForCausalLM(config).to(dtype).eval()
    return Given(model, next_token_loss, {"input_ids": ids}, ids, {"output": "logits"})


@entry("transformers", "Llama")
def _() -> Given:
    return _llama(DOUBLE)


@entry("transformers", "Llama, float32")
def _() -> Given:
    return _llama(torch.float32)


def _t5(dtype: torch.dtype) -> Given:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=61, d_model=24, d_kv=6, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )  # fmt: skip
    ids, labels = tokens(4, 9, vocabulary=61), tokens(4, 6, vocabulary=61, seed=3)
    return Given(T5ForConditionalGeneration(config).to(dtype).eval(), None, {"input_ids": ids, "labels": labels})


@entry("transformers", "T5 v1.1")
def _() -> Given:
    return _t5(DOUBLE)


@entry("transformers", "T5 v1.1, float32")
def _() -> Given:
    return _t5(torch.float32)


def _mamba(dtype: torch.dtype) -> Given:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
    ids = tokens(3, 8, vocabulary=61)
    model = MambaForCausalLM(config).to(dtype).eval()
    return Given(model, next_token_loss, {"input_ids": ids}, ids, {"output": "logits"})


@entry("transformers", "Mamba")
def _() -> Given:
    return _mamba(DOUBLE)


@entry("transformers", "Mamba, float32")
def _() -> Given:
    return _mamba(torch.float32)


@entry("transformers", "OPT, ReLU")
def _() -> Given:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, ffn_dim=48, max_position_embeddings=16,
        num_attention_heads=4, word_embed_proj_dim=24,
    )  # fmt: skip
    ids = tokens(4, 10, vocabulary=61, least=3)
    model = OPTForCausalLM(config).double().eval()
    return Given(model, next_token_loss, {"input_ids": ids}, ids, {"output": "logits"})


@entry("transformers", "Mixtral, 4 experts, float32")
def _() -> Given:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=61, hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    ids = tokens(4, 10, vocabulary=61)
    return Given(MixtralForCausalLM(config).float().eval(), None, {"input_ids": ids, "labels": ids})


@entry("transformers", "CLIP, text tower")
def _() -> Given:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=61, hidden_size=24, intermediate_size=48, projection_dim=12, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16,
    )  # fmt: skip
    ids = tokens(4, 10, vocabulary=61)
    model = CLIPTextModelWithProjection(config).double().eval()
    return Given(model, nn.MSELoss(), {"input_ids": ids}, normal(4, 12, seed=3), {"output": "text_embeds"})


def _wav2vec2(**options: Any) -> Given:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, mask_time_prob=0.0,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    inputs = {"input_values": normal(2, 200).float(), "labels": tokens(2, 4, vocabulary=9, least=1)}
    return Given(Wav2Vec2ForCTC(config).eval(), None, inputs, options=options)


@entry("transformers", "Wav2Vec2, CTC, float32")
def _() -> Given:
    return _wav2vec2()


@entry("transformers", "Wav2Vec2, CTC, float32, by differences")
def _() -> Given:
    return _wav2vec2(derivatives="finite-difference")


@entry("transformers", "Whisper")
def _() -> Given:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=61, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=12,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    inputs = {"input_features": normal(3, 8, 24), "labels": tokens(3, 6, vocabulary=61, least=4)}
    return Given(WhisperForConditionalGeneration(config).double().eval(), None, inputs)


# graphs


def _graph() -> tuple[dict[str, Tensor], Tensor]:
    """A ring of 20 nodes with 20 chords, 6 features a node, 4 classes."""
    ring = torch.arange(20)
    chords = tokens(2, 20, vocabulary=20, seed=5)
    edges = torch.cat([torch.stack([ring, (ring + 1) % 20]), chords], dim=1)
    edges = torch.cat([edges, edges.flip(0)], dim=1)
    return {"x": normal(20, 6), "edge_index": edges}, tokens(20, vocabulary=4)


@entry("torch-geometric", "GCN, tanh")
def _() -> Given:
    from torch_geometric.nn.models import GCN

    inputs, labels = _graph()
    return Given(GCN(6, 16, 2, 4, act="tanh").double(), nn.CrossEntropyLoss(), inputs, labels)


@entry("torch-geometric", "GAT, elu")
def _() -> Given:
    from torch_geometric.nn.models import GAT

    inputs, labels = _graph()
    return Given(GAT(6, 16, 2, 4, act="elu", heads=2).double(), nn.CrossEntropyLoss(), inputs, labels)


@entry("torch-geometric", "GIN, tanh")
def _() -> Given:
    from torch_geometric.nn.models import GIN

    inputs, labels = _graph()
    return Given(GIN(6, 12, 2, 4, act="tanh").double(), nn.CrossEntropyLoss(), inputs, labels)


@entry("torch-geometric", "GraphSAGE, ReLU")
def _() -> Given:
    from torch_geometric.nn.models import GraphSAGE

    inputs, labels = _graph()
    return Given(GraphSAGE(6, 12, 2, 4).double(), nn.CrossEntropyLoss(), inputs, labels)


# differential equations


class ODENet(nn.Module):
    """The README's neural ODE: y(1) of y' = A tanh(B y³)."""

    def __init__(self, solve: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.f = ODEFunction()
        self.solve, self.options = solve, options

    def forward(self, y: Tensor) -> Tensor:
        return self.solve(self.f, y, y.new_tensor([0.0, 1.0]), **self.options)[-1]


class ODEFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y**3)


def _ode(adjoint: bool = False, solver: dict[str, Any] | None = None, **options: Any) -> Given:
    from torchdiffeq import odeint, odeint_adjoint

    model = ODENet(odeint_adjoint if adjoint else odeint, **solver or {"rtol": 1e-7, "atol": 1e-8}).double()
    return Given(model, nn.MSELoss(), normal(8, 2), normal(8, 2, seed=3), options)


def _ode_in_fine_steps() -> Given:
    """The solution that an adaptive solver approximates; the solver's own differences include its step changes."""
    return _ode(solver={"method": "rk4", "options": {"step_size": 0.01}})


@entry("torchdiffeq", "neural ODE, rk4")
def _() -> Given:
    return _ode(solver={"method": "rk4", "options": {"step_size": 0.1}})


@entry("torchdiffeq", "neural ODE, dopri5, tolerance 1e-7", _ode_in_fine_steps)
def _() -> Given:
    return _ode()


@entry("torchdiffeq", "neural ODE, dopri5, adjoint", _ode_in_fine_steps)
def _() -> Given:
    return _ode(adjoint=True)


@entry("torchdiffeq", "neural ODE, dopri5, adjoint, by differences", _ode_in_fine_steps)
def _() -> Given:
    return _ode(adjoint=True, derivatives="finite-difference")


# one package each


@entry("siren-pytorch", "SIREN")
def _() -> Given:
    from siren_pytorch import SirenNet

    model = SirenNet(dim_in=2, dim_hidden=24, dim_out=1, num_layers=3, w0_initial=30.0).double()
    xy = torch.cartesian_prod(*[torch.linspace(-1, 1, 8, dtype=DOUBLE)] * 2)
    return Given(model, nn.MSELoss(), xy, xy.prod(1, keepdim=True))


@entry("g-mlp-pytorch", "gMLP")
def _() -> Given:
    from g_mlp_pytorch import gMLP

    ids = tokens(4, 8, vocabulary=40)
    return Given(gMLP(num_tokens=40, dim=16, depth=2, seq_len=8).double(), token_loss, ids, ids.roll(1, 1))


def _x_transformer(dtype: torch.dtype) -> Given:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=24, depth=2, heads=2, attn_dim_head=12, rotary_pos_emb=True, ff_glu=True)
    ids = tokens(4, 10, vocabulary=40)
    model = TransformerWrapper(num_tokens=40, max_seq_len=16, attn_layers=layers).to(dtype)
    return Given(model, token_loss, ids, ids.roll(1, 1))


@entry("x-transformers", "decoder, rotary positions, GLU")
def _() -> Given:
    return _x_transformer(DOUBLE)


@entry("x-transformers", "decoder, rotary positions, GLU, float32")
def _() -> Given:
    return _x_transformer(torch.float32)


@entry("mlp-mixer-pytorch", "MLP-Mixer")
def _() -> Given:
    from mlp_mixer_pytorch import MLPMixer

    model = MLPMixer(image_size=16, channels=3, patch_size=4, dim=24, depth=2, num_classes=5).double().eval()
    return Given(model, nn.CrossEntropyLoss(), normal(6, 3, 16, 16), tokens(6, vocabulary=5))


@entry("linear-attention-transformer", "language model")
def _() -> Given:
    from linear_attention_transformer import LinearAttentionTransformerLM

    model = LinearAttentionTransformerLM(
        num_tokens=40, dim=16, heads=2, depth=2, max_seq_len=8, causal=False, n_local_attn_heads=0
    )
    ids = tokens(4, 8, vocabulary=40)
    return Given(model.double().eval(), token_loss, ids, ids.roll(1, 1))


@entry("pykan", "KAN")
def _() -> Given:
    from kan import KAN

    model = KAN(width=[2, 5, 1], grid=3, k=3, seed=0, auto_save=False).double()
    x = normal(20, 2).tanh()
    return Given(model, nn.MSELoss(), x, x.prod(1, keepdim=True))


def _mambapy(dtype: torch.dtype, parallel: bool, **options: Any) -> Given:
    from mambapy.mamba import Mamba, MambaConfig

    model = Mamba(MambaConfig(d_model=12, n_layers=2, d_state=4, pscan=parallel)).to(dtype)
    return Given(model, nn.MSELoss(), normal(4, 8, 12).to(dtype), normal(4, 8, 12, seed=3).to(dtype), options)


@entry("mambapy", "Mamba, parallel scan")
def _() -> Given:
    return _mambapy(DOUBLE, parallel=True)


@entry("mambapy", "Mamba, parallel scan, float32")
def _() -> Given:
    return _mambapy(torch.float32, parallel=True)


@entry("mambapy", "Mamba, parallel scan, float32, by differences")
def _() -> Given:
    return _mambapy(torch.float32, parallel=True, derivatives="finite-difference")


@entry("mambapy", "Mamba, sequential scan, float32")
def _() -> Given:
    return _mambapy(torch.float32, parallel=False)


@entry("ncps", "CfC, closed-form continuous time")
def _() -> Given:
    from ncps.torch import CfC

    return Given(CfC(4, 12).double(), nn.MSELoss(), normal(6, 7, 4), normal(6, 7, 12, seed=3).tanh(), {"output": 0})


@entry("ncps", "LTC, liquid time constants")
def _() -> Given:
    from ncps.torch import LTC
    from ncps.wirings import AutoNCP

    model = LTC(4, AutoNCP(12, 2)).double()
    return Given(model, nn.MSELoss(), normal(6, 7, 4), normal(6, 7, 2, seed=3).tanh(), {"output": 0})


class LossOf(nn.Module):
    """A model and its loss in one module, whose output is the loss."""

    def __init__(self, parts: list[nn.Module], loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.parts, self.loss = nn.ModuleList(parts), loss

    def forward(self, *data: Tensor) -> Tensor:
        return self.loss(*self.parts, *data)


def _flow(dtype: torch.dtype) -> nn.Module:
    import normflows

    flows = []
    for _ in range(3):
        net = normflows.nets.MLP([1, 16, 16, 2], init_zeros=True)
        flows += [normflows.flows.AffineCouplingBlock(net), normflows.flows.Permute(2, mode="swap")]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), flows).to(dtype)


@entry("normflows", "RealNVP, density taken in the criterion")
def _() -> Given:
    model = _flow(DOUBLE)
    return Given(model, lambda z: -model.q0.log_prob(z).mean(), normal(20, 2))


@entry("normflows", "RealNVP, forward_kld in one module")
def _() -> Given:
    return Given(LossOf([_flow(DOUBLE)], lambda model, x: model.forward_kld(x)), None, normal(20, 2))


@entry("normflows", "RealNVP, forward_kld in one module, float32")
def _() -> Given:
    return Given(LossOf([_flow(torch.float32)], lambda model, x: model.forward_kld(x)), None, normal(20, 2).float())


def _gaussian_process() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    import gpytorch

    class ExactGP(gpytorch.models.ExactGP):
        def __init__(self, x: Tensor, y: Tensor, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    x = torch.linspace(0, 1, 12, dtype=DOUBLE)
    y = torch.sin(6 * x) + 0.1 * normal(12)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = ExactGP(x, y, likelihood).double()
    return model, gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model), x, y


@entry("gpytorch", "exact GP, marginal likelihood as the criterion")
def _() -> Given:
    model, likelihood, x, y = _gaussian_process()
    return Given(model, lambda prior, targets: -likelihood(prior, targets), x, y)


def _gaussian_process_in_one(**options: Any) -> Given:
    model, likelihood, x, y = _gaussian_process()
    loss = LossOf([model, likelihood], lambda model, likelihood, x, y: -likelihood(model(x), y))
    return Given(loss, None, (x, y), options=options)


@entry("gpytorch", "exact GP, marginal likelihood in one module")
def _() -> Given:
    return _gaussian_process_in_one()


@entry("gpytorch", "exact GP, marginal likelihood in one module, by differences")
def _() -> Given:
    return _gaussian_process_in_one(derivatives="finite-difference")


class PointNetwork(nn.Module):
    """Two tensor products with a gate, on vectors of points; rotations of the input leave the output as it is."""

    def __init__(self) -> None:
        super().__init__()
        from e3nn import o3
        from e3nn.nn import Gate

        self.irreps = o3.Irreps.spherical_harmonics(2)
        self.gate = Gate("8x0e", [torch.tanh], "4x0e", [torch.sigmoid], "4x1o")
        self.first = o3.FullyConnectedTensorProduct(self.irreps, self.irreps, self.gate.irreps_in)
        self.second = o3.FullyConnectedTensorProduct(self.gate.irreps_out, self.irreps, "1x0e")
        self.harmonics = o3.SphericalHarmonics(self.irreps, normalize=True, normalization="component")

    def forward(self, x: Tensor) -> Tensor:
        y = self.harmonics(x)
        return self.second(self.gate(self.first(y, y)), y)


@entry("e3nn", "two gated tensor products")
def _() -> Given:
    return Given(PointNetwork().double(), nn.MSELoss(), normal(16, 3), normal(16, 1, seed=3))


@entry("neuraloperator", "FNO, complex weights, float32")
def _() -> Given:
    from neuralop.models import FNO

    model = FNO(n_modes=(4,), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2)
    return Given(model, nn.MSELoss(), normal(4, 1, 16).float(), normal(4, 1, 16, seed=3).float())


@entry("pytorch-tabnet", "TabNet")
def _() -> Given:
    from pytorch_tabnet.tab_network import TabNet

    model = TabNet(6, 2, n_d=4, n_a=4, n_steps=2, group_attention_matrix=torch.eye(6, dtype=DOUBLE)).double().eval()
    return Given(model, nn.MSELoss(), normal(20, 6), normal(20, 2, seed=3), {"output": 0})


@entry("efficientnet-pytorch", "EfficientNet-B0, a tenth as wide, float32")
def _() -> Given:
    from efficientnet_pytorch import EfficientNet

    options = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "image_size": 16, "num_classes": 5}
    model = EfficientNet.from_name("efficientnet-b0", **options).eval()
    return Given(model, nn.CrossEntropyLoss(), normal(4, 3, 16, 16).float(), tokens(4, vocabulary=5))
