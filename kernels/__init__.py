"""Triton kernels behind `varlik.ops`; installed as `varlik.kernels`.

One file per op, named like its file in `varlik/ops`. A kernel knows tensors only: it imports torch, triton and its
siblings here, and nothing else of varlik. `varlik.ops` imports a kernel inside the function that launches it, so varlik
works where triton is absent. Nobody else imports this package, and nobody writes `import kernels`.
"""
