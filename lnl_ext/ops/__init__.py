"""The operators as PyTorch knows them: arguments, fake kernels, autograd, the plain formula."""
