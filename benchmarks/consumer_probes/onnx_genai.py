"""Log-probabilities by ONNX Runtime GenAI, of the ONNX model that its own builder makes of the folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose files are named after the programs
import numpy as np
import onnxruntime_genai

request = json.load(sys.stdin)
builder = Path(onnxruntime_genai.__file__).parent / "models" / "builder.py"
built = Path.cwd() / "built"
command = [sys.executable, str(builder), "-i", request["model"], "-o", str(built), "-p", "fp32", "-e", "cpu"]
done = subprocess.run(
    [*command, "-c", str(Path.cwd() / "cache")], env=os.environ, capture_output=True, text=True, check=False
)
assert done.returncode == 0, done.stderr[-1500:] + done.stdout[-500:]
model = onnxruntime_genai.Model(str(built))
answer = {}
for length in request["lengths"]:
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length + 2)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array(request["ids"][:length], dtype=np.int32))
    values = np.asarray(generator.get_logits()).reshape(-1)[-1024:].astype(np.float64)
    answer[str(length)] = values - np.log(np.exp(values - values.max()).sum()) - values.max()
np.savez(sys.argv[1], **answer)
