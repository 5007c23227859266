"""Every method, and the combinations that make sense, by name."""

from typing import Any

from domain.peft.algorithms import Algorithm

_NF4 = {"quantization": "nf4"}
_RS = {"use_rslora": True}
VARIANTS: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    **{algorithm.value: (algorithm, {}) for algorithm in Algorithm},
    "lora gaussian": (Algorithm.LORA, {"init_weights": "gaussian"}),
    "qlora rslora": (Algorithm.QLORA, _RS),
    "qlora dora": (Algorithm.QLORA, {"use_dora": True}),
    "dora nf4": (Algorithm.DORA, _NF4),
    "dora rslora": (Algorithm.DORA, _RS),
    "dora nf4 rslora": (Algorithm.DORA, _NF4 | _RS),
    "pissa nf4": (Algorithm.PISSA, _NF4),
    "pissa rslora": (Algorithm.PISSA, _RS),
    "pissa nf4 rslora": (Algorithm.PISSA, _NF4 | _RS),
    "rslora nf4": (Algorithm.RSLORA, _NF4),
    "olora rslora": (Algorithm.OLORA, _RS),
    "olora nf4": (Algorithm.OLORA, _NF4),
    "lora-plus nf4 dora": (Algorithm.LORA_PLUS, _NF4 | {"use_dora": True}),
    "loftq rslora": (Algorithm.LOFTQ, _RS),
    "loftq 3": (Algorithm.LOFTQ, {"loftq_iterations": 3}),
    "rslora dora": (Algorithm.RSLORA, {"use_dora": True}),
}
