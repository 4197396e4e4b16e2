"""W′ of the methods of PEFT other than LoRA, by their formulas, in numpy and float64 alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from oracle.formulas import Array, Module


def flat(W: Array) -> Array:
    return W.reshape(len(W), -1)


def loha(m: Module) -> Array:
    a1, b1, a2, b2 = (m.t[f"hada_w{n}_{side}"] for n in "12" for side in "ab")
    s = m.scaling(len(b1), "alpha")
    if "hada_t1" in m.t:  # effective convolutions
        first, second = (
            np.einsum("ijkl,ip,jr->prkl", m.t[f"hada_t{n}"], a, b)
            for n, a, b in (("1", a1, b1), ("2", a2, b2))
        )
        return m.W + s * first * second
    return m.W + s * ((a1 @ b1) * (a2 @ b2)).reshape(m.W.shape)


def lokr(m: Module) -> Array:
    s = m.scaling(m.of("r", "rank_pattern"), "alpha") if "exclude_modules" in m.config else 1
    w1 = m.t["lokr_w1"] if "lokr_w1" in m.t else m.t["lokr_w1_a"] @ m.t["lokr_w1_b"]
    if "lokr_w2" in m.t:
        w2 = m.t["lokr_w2"]
    elif "lokr_t2" in m.t:
        w2 = np.einsum("ijkl,ip,jr->prkl", *(m.t[f"lokr_{n}"] for n in ("t2", "w2_a", "w2_b")))
    else:
        w2 = m.t["lokr_w2_a"] @ m.t["lokr_w2_b"]
    if w2.ndim == 4:
        w1 = w1[..., None, None]
    return m.W + s * np.kron(w1, w2).reshape(m.W.shape)


def adalora(m: Module) -> Array:
    A, B, E = (m.t[f"lora_{n}"] for n in "ABE")
    return m.W + m.config["lora_alpha"] / (m.config["init_r"] + 1e-5) * B @ (E * A)


def vera(m: Module, kind: str = "vera") -> Array:
    """λ_b B λ_d A; of PVeRA the first half of λ_d and A, the means."""
    b, d = m.t[f"{kind}_lambda_b"], m.t[f"{kind}_lambda_d"]
    A, B = m.shared[f"{kind}_A"][:, : m.W.shape[1]], m.shared[f"{kind}_B"][: len(m.W)]
    rank = B.shape[1]
    return m.W + (b[:, None] * B) @ (d[:rank, None] * A[:rank])


def pvera(m: Module) -> Array:
    return vera(m, "pvera")


def ia3(m: Module) -> Array:
    factors = m.t["ia3_l"].reshape(-1)
    inputs = any(m.name.endswith(name) for name in m.config["feedforward_modules"])
    shape = [1] * m.W.ndim
    shape[1 if inputs else 0] = -1
    return m.W * factors.reshape(shape)


def hra(m: Module) -> Array:
    """W H₁ ⋯ H_r, H = I − 2 u uᵀ of unit vectors, made orthogonal first or not."""
    U, W = m.t["hra_u"].copy(), flat(m.W)
    for n in range(U.shape[1]):
        if m.config.get("apply_GS"):
            for before in U[:, :n].T:
                U[:, n] -= before * (before @ U[:, n])
        U[:, n] /= np.linalg.norm(U[:, n])
        W = W - 2 * np.outer(W @ U[:, n], U[:, n])
    return W.reshape(m.W.shape)


def hira(m: Module) -> Array:
    change = flat(m.t["hira_B"]) @ flat(m.t["hira_A"])
    return m.W + m.W * change.reshape(m.W.shape)


def miss(m: Module, key: str = "miss_block") -> Array:
    block = m.t[key]
    out, inputs = m.W.shape
    if block.ndim == 3:  # Bat
        r, V = block.shape[1], m.W.copy()
        for o in range(out // r):
            for i in range(inputs // r):
                rows, columns = slice(o * r, o * r + r), slice(i * r, i * r + r)
                V[rows, columns] += m.W[rows, columns] @ block[o] + block[o]
        return V
    o, i = np.indices(m.W.shape)
    return m.W + block[i % len(block), o % block.shape[1]]


def bone(m: Module) -> Array:
    return miss(m, "bone_block")


def gralora(m: Module) -> Array:
    """K × k blocks; the rank's n-th part is for the n-th column of blocks, or of rows."""
    A, B, k = m.t["gralora_A"], m.t["gralora_B"], m.config["gralora_k"]
    V = m.W.copy()
    out, inputs, part = len(V) // k, V.shape[1] // k, A.shape[2] // k
    hybrid = m.config.get("hybrid_r") or 0
    s = m.config["alpha"] / (m.config["r"] + hybrid)
    for j in range(k):
        for n in range(k):
            left = B[j][n * part : (n + 1) * part].T
            right = A[n][:, j * part : (j + 1) * part].T
            V[j * out : (j + 1) * out, n * inputs : (n + 1) * inputs] += s * left @ right
    if hybrid:
        V += s * m.t["gralora_B_general.weight"] @ m.t["gralora_A_general.weight"]
    return V


def delora(m: Module) -> Array:
    A, B = m.t["delora_A"], m.t["delora_B"]
    norms = np.linalg.norm(A, axis=1) * np.linalg.norm(B, axis=0)
    return m.W + B * (m.t["delora_lambda"] / (len(A) * norms)) @ A * m.t["delora_w_norm"]


def c3a(m: Module) -> Array:
    """Circulant blocks over the number of inputs."""
    kernel, V = m.t["c3a_kernel"], m.W.copy()
    b = kernel.shape[2]
    t, p = np.indices((b, b))
    for o, row in enumerate(kernel):
        for i, values in enumerate(row):
            block = values[(p - t) % b] / V.shape[1]
            V[o * b : (o + 1) * b, i * b : (i + 1) * b] += block
    return V


def rotations(m: Module) -> Array:
    """OFT's R, block-diagonal: Cayley's transform of Q, or I + 2 Q + 2 Q² and so on."""
    upper, c = m.t["oft_R.weight"], m.config
    size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
    if c.get("coft"):
        limit = c["eps"] / math.sqrt(len(upper))
        norms = math.sqrt(2) * np.linalg.norm(upper, axis=1, keepdims=True)
        upper = upper * np.minimum(1, limit / norms)
    blocks = []
    for row in upper:
        Q, eye = np.zeros((size, size)), np.eye(size)
        Q[np.triu_indices(size, 1)] = row
        Q -= Q.T
        if c["use_cayley_neumann"]:
            terms, newer = c["num_cayley_neumann_terms"], bool(c.get("peft_version"))
            weights = [1, *[2] * (terms - 2), 1 if newer else 2]
            blocks.append(sum(w * np.linalg.matrix_power(Q, n) for n, w in enumerate(weights)))
        else:
            blocks.append((eye - Q) @ np.linalg.inv(eye + Q))
    return diagonal(blocks * (m.W.shape[1] // size if len(blocks) == 1 else 1))


def diagonal(blocks: list[Array]) -> Array:
    zero = np.zeros_like(blocks[0])
    return np.block([[b if r == c else zero for c in range(len(blocks))]
                     for r, b in enumerate(blocks)])  # fmt: skip


def oft(m: Module) -> Array:
    if "oft_r" not in m.t:
        return m.W @ rotations(m).T
    R, c = m.t["oft_r"], m.config
    if c.get("coft"):
        limit = c["eps"] * R.shape[1] ** 2 / math.sqrt(len(R))
        R = R * np.minimum(1, limit / np.linalg.norm(R, axis=(1, 2), keepdims=True))
    eye = np.eye(R.shape[1])
    blocks = [(eye - S) @ np.linalg.inv(eye + S) for S in (R - R.swapaxes(1, 2)) / 2]
    D = diagonal(blocks * (c["r"] if len(blocks) == 1 else 1))[: len(m.W), : len(m.W)]
    return (D.T @ flat(m.W)).reshape(m.W.shape)


def boft(m: Module) -> Array:
    """S (W Qᵀ), factor n turning what lies 2ⁿ half blocks apart."""
    R, V = m.t["boft_R"], flat(m.W)
    _, blocks, size, _ = R.shape
    eye = np.eye(size)
    for n, factor in enumerate(R):
        turn = diagonal([(eye - S) @ np.linalg.inv(eye + S)
                         for S in (factor - factor.swapaxes(1, 2)) / 2])  # fmt: skip
        order = np.arange(blocks * size)
        if n:
            halves = order.reshape(blocks >> n, -1, 2, size // 2)
            order = halves.swapaxes(1, 2).reshape(-1)
        P = np.eye(len(order))[order]
        V = V @ (P.T @ turn @ P).T if not n else V @ (P @ turn @ P.T).T
    return (V * m.t["boft_s"].reshape(-1, 1)).reshape(m.W.shape)


def road_matrix(m: Module) -> Array:
    theta, alpha = m.t["road_theta"], m.t["road_alpha"]
    out, group, variant = len(m.W), m.config["group_size"], m.config["variant"]
    half, R = group // 2, np.zeros((len(m.W), len(m.W)))
    for first in range(0, out, group):
        for n in range(half):
            x, y = first + n, first + half + n
            if variant == "road_1":
                at = [first // 2 + n] * 4
            elif variant == "road_2":
                at = [x, x, y, y]
            else:  # cosines of both, then sines of both
                at = [2 * first + n, 2 * first + group + n,
                      2 * first + half + n, 2 * first + group + half + n]  # fmt: skip
            R[x, x], R[x, y] = (alpha * np.cos(theta))[at[0]], -(alpha * np.sin(theta))[at[1]]
            R[y, y], R[y, x] = (alpha * np.cos(theta))[at[2]], (alpha * np.sin(theta))[at[3]]
    return R


def road(m: Module) -> Array:
    return road_matrix(m) @ m.W


def shira(m: Module) -> Array:
    V = m.W.copy()
    np.add.at(V, tuple(m.t["shira_indices"].astype(int)), m.t["shira_weight"])
    return V


def supertuning(m: Module) -> Array:
    V = m.W.copy().reshape(-1)
    np.add.at(V, m.t["supertuning_indices"].astype(int), m.t["supertuning_values"])
    return V.reshape(m.W.shape)


def fourierft(m: Module) -> Array:
    """The places are those that torch draws."""
    values = m.t["fourierft_spectrum"]
    shape = m.W.shape
    generator = torch.Generator().manual_seed(m.config["random_loc_seed"])
    drawn = torch.randperm(math.prod(shape), generator=generator)[: len(values)].numpy()
    F = np.zeros(shape)
    F[drawn // shape[1], drawn % shape[1]] = values
    return m.W + m.config["scaling"] * np.fft.ifft2(F).real


LOW_PASS = {
    "db1": [math.sqrt(0.5)] * 2,
    "db4": [0.23037781330885523, 0.7148465705525415, 0.6308807679295904, -0.02798376941698385,
            -0.18703481171888114, 0.030841381835986965, 0.032883011666982945,
            -0.010597401784997278],
}  # fmt: skip


def waveft(m: Module) -> Array:
    """One level of a wavelet transform backwards; PEFT crosses the two mixed quarters."""
    values, shape = m.t["waveft_spectrum"], m.W.shape
    generator = torch.Generator().manual_seed(m.config["random_loc_seed"])
    drawn = torch.randperm(math.prod(shape), generator=generator)[: len(values)].numpy()
    low = np.array(LOW_PASS[m.config["wavelet_family"]])
    filters = (low, low[::-1] * np.resize([1, -1], len(low)))
    halves = [(size + len(low) - 1) // 2 for size in shape]
    C = np.zeros([2 * half for half in halves])
    shifts = [(2 * half - size) // 2 for half, size in zip(halves, shape, strict=True)]
    C[drawn // shape[1] + shifts[0], drawn % shape[1] + shifts[1]] = values

    def synthesis(size: int, half: int, taps: Array) -> Array:
        S = np.zeros((size, half))
        for n in range(half):
            for t, tap in enumerate(taps):
                if 0 <= (at := 2 * n + 2 - len(taps) + t) < size:
                    S[at, n] = tap
        return S

    quarters = [np.hsplit(rows, 2) for rows in np.vsplit(C, 2)]
    change = sum(
        synthesis(shape[0], halves[0], filters[b])
        @ quarters[a][b]
        @ synthesis(shape[1], halves[1], filters[a]).T
        for a in (0, 1)
        for b in (0, 1)
    )
    return m.W + m.config["scaling"] * change


def frod(m: Module) -> Array:
    """U (S + diag λ) Vᵀ, W being U diag(λ₀) Vᵀ with columns of U of length 1."""
    role = "_".join(m.name.split(".")[-2:])
    V, at = m.shared[f"frod_V.{role}"], m.shared[f"frod_s_indices.{role}"].astype(int)
    U = m.W @ np.linalg.inv(V.T)
    U /= np.linalg.norm(U, axis=0)
    S = np.diag(m.t["frod_lambda_l"])
    np.add.at(S, tuple(at), m.t["frod_lambda_s_values"])
    return U @ S @ V.T


def tinylora(m: Module) -> Array:
    """The vectors are those of the modules, in the order of the model's code: q, o, q, o."""
    layer = int(m.name.split(".")[2])
    v = m.shared[f"tinylora_v.{2 * layer + m.name.endswith('o_proj')}"]
    R = np.einsum("i,ijk->jk", v, m.t["tinylora_P"])
    return m.W + m.t["tinylora_B"] @ R @ m.t["tinylora_A"]


def vblora(m: Module) -> Array:
    """Vectors of a bank, weighted by a softmax over the largest logits."""
    bank, topk = m.shared["vblora_vector_bank"], m.config["topk"]

    def pieces(side: str) -> Array:
        if f"vblora_logits_{side}" in m.t:
            logits = m.t[f"vblora_logits_{side}"]
            # Which of two that are equal is torch's affair.
            at = torch.from_numpy(logits).float().topk(topk).indices.numpy()
            weights = np.exp(np.take_along_axis(logits, at, -1))
            weights /= weights.sum(-1, keepdims=True)
        else:
            at = m.t[f"vblora_logits_{side}_topk_indices"].astype(int)
            saved = m.t[f"vblora_logits_{side}_topk_weights"]
            weights = np.concatenate([saved, 1 - saved.sum(-1, keepdims=True)], -1)
        return (weights[..., None] * bank[at]).sum(-2)

    A, B = pieces("A"), pieces("B")
    return m.W + B.swapaxes(1, 2).reshape(-1, B.shape[1]) @ A.reshape(len(A), -1)


def randlora(m: Module) -> Array:
    scale, gamma = m.t["randlora_lambda"], m.t["randlora_gamma"]
    (r, bases), short, long = scale.shape, gamma.shape[1], max(m.W.shape)
    A, B = m.shared["randlora_A"][:, 0, :short], m.shared["randlora_B"][:long, :bases]
    change = sum(
        np.outer(B[:, at // r, at % r], scale[at // bases, at % bases] * A[at // bases]
                 * gamma[at % bases])
        for at in range(r * bases)
    )  # fmt: skip
    s = m.config["randlora_alpha"] / m.config["r"]
    return m.W + s * (change if change.shape == m.W.shape else change.T)


def deft(m: Module) -> Array:
    P = m.t["deft_P"]
    over = np.maximum(P, 0)
    change = -over.T @ m.W
    if "deft_R" in m.t:
        change += m.t["deft_R"] * (m.config.get("scaling") or 1)
    return m.W + P @ change


def _glora(m: Module, letter: str, shape: tuple[int, ...]) -> Array:
    if f"glora_{letter}.Xd" in m.t:
        return m.t[f"glora_{letter}.Xd"] @ m.t[f"glora_{letter}.Xu"]
    value = m.t.get(f"glora_{letter}.X", m.t.get(f"glora_{letter}.zeros"))
    assert value is not None
    return np.broadcast_to(value, shape)


def glora(m: Module) -> Array:
    return m.W + m.W * _glora(m, "A", m.W.shape) + _glora(m, "B", m.W.shape)


def glora_bias(m: Module) -> Array:
    assert m.b is not None
    C = _glora(m, "C", (m.W.shape[1], 1))
    shape = m.b.shape
    return m.b + m.b * _glora(m, "D", shape) + _glora(m, "E", shape) + (m.W @ C)[:, 0]


def peanut(m: Module) -> Array:
    hidden = np.maximum(m.t["peanut_A.weight"] @ m.W, 0)
    return m.W + m.config["scaling"] * m.t["peanut_B.weight"] @ hidden


def osf(m: Module) -> Array:
    """The end of an SVD of W gives way to what was trained of it."""
    U, S, Vt = np.linalg.svd(m.W, full_matrices=False)
    k = m.config["effective_rank"]
    low = m.t["osf_svd_params.U_low"] * m.t["osf_svd_params.S_low"] @ m.t["osf_svd_params.V_low"]
    return U[:, :k] * S[:k] @ Vt[:k] + low


def unilora(m: Module) -> Array:
    theta = m.shared["unilora_theta_d"]
    A, B = (
        theta[m.t[f"unilora_indices_{n}"].astype(int)] * m.t[f"unilora_scales_{n}"] for n in "AB"
    )
    return m.W + B @ A


METHODS: dict[str, Callable[[Module], Array]] = {
    "LOHA": loha, "LOKR": lokr, "ADALORA": adalora, "VERA": vera, "PVERA": pvera, "IA3": ia3,
    "HRA": hra, "HIRA": hira, "MISS": miss, "BONE": bone, "GRALORA": gralora, "DELORA": delora,
    "C3A": c3a, "OFT": oft, "BOFT": boft, "ROAD": road, "SHIRA": shira, "VBLORA": vblora,
    "SUPERTUNING": supertuning, "FOURIERFT": fourierft, "RANDLORA": randlora, "DEFT": deft,
    "GLORA": glora, "PEANUT": peanut, "OSF": osf, "UNILORA": unilora, "WAVEFT": waveft,
    "FROD": frod, "TINYLORA": tinylora,
}  # fmt: skip
