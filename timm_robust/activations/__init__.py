"""Activation functions for adversarial robustness: functional forms, modules, and the shape of each curve.

Parametric family of Dai, Mahloujifar, Mittal 2021 (https://arxiv.org/abs/2110.05626), each at its initial value a
known one:

| name      | class          | formula                                                 | at init  | shapes           |
|-----------|----------------|---------------------------------------------------------|----------|------------------|
| pssilu    | PSSiLU         | x (s(a x) - b) / (1 - b), a = abs(alpha), b = abs(beta) | SiLU     | near 0, negative |
| psilu     | PSiLU          | x s(abs(alpha) x)                                       | SiLU     | near 0           |
| psoftplus | PSoftplus      | log(1 + exp(a x)) / a, a = abs(alpha)                   | Softplus | near 0           |
| prelu     | PReLU          | x for x > 0, alpha x otherwise                          | ReLU     | negative         |
| pelu      | PELU           | x for x > 0, alpha (exp(x) - 1) otherwise               | ELU      | negative         |
| pprelu    | PReLUPlus      | alpha x for x > 0, 0 otherwise ('PReLU+')               | ReLU     | positive         |
| reblu     | ReBLU          | x + alpha (sqrt(x^2 + 1) - 1) for x > 0, 0 otherwise    | ReLU     | positive         |

Smooth Adversarial Training, Xie et al. 2020 (https://arxiv.org/abs/2006.14536):

| name       | class               | formula                                                                |
|------------|---------------------|------------------------------------------------------------------------|
| smoothrelu | SmoothReLU          | x - log(1 + a x) / a for x >= 0, 0 otherwise, a = raw^2, raw starts at 20 |
| softplus10 | ParametricSoftplus  | log(1 + exp(10 x)) / 10                                                |

and `relu`, `silu`, `gelu`, `elu`, `softplus`. s is the logistic sigmoid. Every function takes any shape, and returns
its input's shape and dtype (a bf16 input gives a bf16 result whatever the dtype of the parameters).

The paper shares one (alpha, beta) over a whole network. A network of ours therefore owns one module of this file, and
hands its blocks the tensors (`act.params()`), which call the class's `call(x, params)`: no tensor stands twice in the
state dict.
"""

from .modules import ACTIVATIONS, Activation, PSiLU, PSSiLU, ReLU, Shape, activation_state, get_activation, has_kernels
from .pssilu import Kernels, compile_kernels, compiled_kernels, using

__all__ = [
    'ACTIVATIONS',
    'Activation',
    'Kernels',
    'PSSiLU',
    'PSiLU',
    'ReLU',
    'Shape',
    'activation_state',
    'compile_kernels',
    'compiled_kernels',
    'get_activation',
    'has_kernels',
    'using',
]
