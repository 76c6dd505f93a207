torch: str
cuda: str
cuda_arch_list: str
compiler: str

def cpu_capability() -> str: ...
