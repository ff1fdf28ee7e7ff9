"""What each kind of edit means, as loops over cells: the slow, obvious version."""

from collections.abc import Callable, Sequence

from torch import Tensor

Value = Callable[[Tensor, int, int], Tensor]
"""(a cell's value, its row, its column) -> what stands there after the edit."""


def in_cells(
    cells: Sequence[tuple[int, int]], value: Value, *, heads: Sequence[int] | None = None, grid: bool = False
) -> Callable[[Tensor], Tensor]:
    """Change the cells (row, column) of a site; `grid`: of scores and pattern, where a column is a destination."""

    def change(x: Tensor) -> Tensor:
        out = x.clone()
        for row, column in cells:
            for head in range(x.shape[1] if grid else x.shape[2]) if heads is None and grid else heads or [None]:
                if grid:
                    out[row, head, column] = value(x[row, head, column], row, column)
                elif head is None:
                    out[row, column] = value(x[row, column], row, column)
                else:
                    out[row, column, head] = value(x[row, column, head], row, column)
        return out

    return change


def unit(direction: Tensor) -> Tensor:
    return direction / (direction**2).sum() ** 0.5


def along(x: Tensor, u: Tensor) -> Tensor:
    """x·u, kept as a last dimension of one."""
    return (x * u).sum(-1, keepdim=True)


def projected_out(x: Tensor, direction: Tensor) -> Tensor:
    u = unit(direction)
    return x - along(x, u) * u


def clamped(x: Tensor, direction: Tensor, low: float | None, high: float | None) -> Tensor:
    u = unit(direction)
    now = along(x, u)
    wanted = now
    if low is not None:
        wanted = wanted.where(wanted > low, low)
    if high is not None:
        wanted = wanted.where(wanted < high, high)
    return x + (wanted - now) * u


def latent_clamped(x: Tensor, encoder: Tensor, bias: float, decoder: Tensor, value: float, offset: Tensor) -> Tensor:
    activation = (along(x - offset, encoder) + bias).clamp(min=0)
    return x + (value - activation) * decoder
