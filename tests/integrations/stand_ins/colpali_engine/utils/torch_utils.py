def get_torch_device(device: str = "auto") -> str:
    return "cpu" if device == "auto" else device
