"""GANomaly: pyramids of named layers, encoder, decoder and encoder again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

_leaky = partial(nn.LeakyReLU, 0.2, inplace=True)


def _extra(main: nn.Sequential, count: int, width: int, activation: Callable[[], nn.Module]) -> None:
    for t in range(count):
        main.add_module(f"extra-layers-{t}-{width}-conv", nn.Conv2d(width, width, 3, 1, 1, bias=False))
        main.add_module(f"extra-layers-{t}-{width}-batchnorm", nn.BatchNorm2d(width))
        main.add_module(f"extra-layers-{t}-{width}-relu", activation())


class Pyramid(nn.Module):
    """Layers that are called one after another, on several GPUs where asked."""

    def __init__(self, isize: int, ngpu: int) -> None:
        super().__init__()
        assert isize % 16 == 0, "isize has to be a multiple of 16"
        self.ngpu, self.main = ngpu, nn.Sequential()

    def forward(self, input: Tensor) -> Tensor:
        if self.ngpu > 1:
            return nn.parallel.data_parallel(self.main, input, range(self.ngpu))
        return self.main(input)


class Encoder(Pyramid):
    """Images [N, C, S, S] -> codes [N, Z, 1, 1], or maps [N, F, 4, 4] without the last convolution."""

    def __init__(
        self,
        isize: int,
        nz: int,
        nc: int,
        ndf: int,
        ngpu: int = 1,
        n_extra_layers: int = 0,
        add_final_conv: bool = True,
    ) -> None:
        super().__init__(isize, ngpu)
        main = self.main
        main.add_module(f"initial-conv-{nc}-{ndf}", nn.Conv2d(nc, ndf, 4, 2, 1, bias=False))
        main.add_module(f"initial-relu-{ndf}", _leaky())
        csize, cndf = isize / 2, ndf
        _extra(main, n_extra_layers, cndf, _leaky)
        while csize > 4:
            main.add_module(f"pyramid-{cndf}-{cndf * 2}-conv", nn.Conv2d(cndf, cndf * 2, 4, 2, 1, bias=False))
            main.add_module(f"pyramid-{cndf * 2}-batchnorm", nn.BatchNorm2d(cndf * 2))
            main.add_module(f"pyramid-{cndf * 2}-relu", _leaky())
            csize, cndf = csize / 2, cndf * 2
        if add_final_conv:
            main.add_module(f"final-{cndf}-1-conv", nn.Conv2d(cndf, nz, 4, 1, 0, bias=False))


class Decoder(Pyramid):
    """Codes [N, Z, 1, 1] -> images [N, C, S, S]."""

    def __init__(self, isize: int, nz: int, nc: int, ngf: int, ngpu: int = 1, n_extra_layers: int = 0) -> None:
        super().__init__(isize, ngpu)
        cngf, tisize = ngf // 2, 4
        while tisize != isize:
            cngf, tisize = cngf * 2, tisize * 2
        main = self.main
        main.add_module(f"initial-{nz}-{cngf}-convt", nn.ConvTranspose2d(nz, cngf, 4, 1, 0, bias=False))
        main.add_module(f"initial-{cngf}-batchnorm", nn.BatchNorm2d(cngf))
        main.add_module(f"initial-{cngf}-relu", nn.ReLU(True))
        csize = 4
        while csize < isize // 2:
            half = cngf // 2
            main.add_module(f"pyramid-{cngf}-{half}-convt", nn.ConvTranspose2d(cngf, half, 4, 2, 1, bias=False))
            main.add_module(f"pyramid-{half}-batchnorm", nn.BatchNorm2d(half))
            main.add_module(f"pyramid-{half}-relu", nn.ReLU(True))
            cngf, csize = half, csize * 2
        _extra(main, n_extra_layers, cngf, partial(nn.ReLU, True))
        main.add_module(f"final-{cngf}-{nc}-convt", nn.ConvTranspose2d(cngf, nc, 4, 2, 1, bias=False))
        main.add_module(f"final-{nc}-tanh", nn.Tanh())


class NetG(nn.Module):
    """Images [N, 3, S, S] -> images, their codes, and the codes of the images made."""

    def __init__(self, isize: int = 32, nz: int = 16, width: int = 8, n_extra_layers: int = 1) -> None:
        super().__init__()
        self.encoder1 = Encoder(isize, nz, 3, width, n_extra_layers=n_extra_layers)
        self.decoder = Decoder(isize, nz, 3, width, n_extra_layers=n_extra_layers)
        self.encoder2 = Encoder(isize, nz, 3, width, n_extra_layers=n_extra_layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent_i = self.encoder1(x)
        gen_imag = self.decoder(latent_i)
        latent_o = self.encoder2(gen_imag)
        return gen_imag, latent_i, latent_o
