"""The sizes of a convolution, as those who choose its kernels and NVIDIA's libraries want them."""

from typing import NamedTuple

from ..reference import conv_output_size, conv_padding


class Shape(NamedTuple):
    """x (batch, height, width, cin) with w (kernel, kernel, cin, cout) gives (batch, rows, cols, cout)."""

    batch: int
    height: int
    width: int
    cin: int
    rows: int
    cols: int
    cout: int
    kernel: int
    stride: int
    upsample: bool
    before: int  # places of padding on both axes
    after: int

    @classmethod
    def of(
        cls, x_shape: tuple[int, ...], cout: int, kernel: int, stride: int, upsample: bool, pad: tuple[int, int] | None
    ) -> "Shape":
        """From the arguments of :func:`kernels.conv2d`."""
        batch, height, width, cin = x_shape
        rows, cols = (conv_output_size(n, kernel, stride, upsample, pad) for n in (height, width))
        before, after = conv_padding(kernel, pad)
        return cls(batch, height, width, cin, rows, cols, cout, kernel, stride, bool(upsample), before, after)

    @property
    def places(self) -> int:
        """Places of the result."""
        return self.batch * self.rows * self.cols

    @property
    def products(self) -> int:
        """Multiplications of one pass, those with the padding's zeros among them."""
        return self.places * self.kernel**2 * self.cin * self.cout

    @property
    def is_product(self) -> bool:
        """Whether it is the matrix product (places, cin) by (cin, cout)."""
        return self.kernel == self.stride == 1 and self.before == self.after == 0 and not self.upsample
