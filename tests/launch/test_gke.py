"""launch/gke.sh and the manifest that it fills in."""

import json
import re
import subprocess

import pytest
import yaml
from conftest import ROOT
from launching import FLAGS, GKE, LAUNCH, call, environment, program, recording_python, records, wait_until


@pytest.fixture
def recorder(tmp_path):
  return recording_python(tmp_path)


def gke(tmp_path, *words: str, flags: list[str] = FLAGS) -> tuple[list[str], dict]:
  """What kubectl is called with, and the manifest that it reads."""
  text = "import json, sys\njson.dump([sys.argv[1:], sys.stdin.read()], open(sys.argv[0] + '.call', 'w'))"
  kubectl = program(tmp_path / "bin" / "kubectl", text)
  env = environment(kubectl.parent)
  finished = call("bash", LAUNCH / "gke.sh", *GKE[:-1], *words, "--", *flags, env=env)
  assert finished.returncode == 0, finished.stderr
  called = (tmp_path / "bin" / "kubectl.call").read_text()
  (tmp_path / "bin" / "kubectl.call").unlink()
  printed = call("bash", LAUNCH / "gke.sh", "--dry-run", *GKE[:-1], *words, "--", *flags, env=env)
  assert not (tmp_path / "bin" / "kubectl.call").exists()
  assert call("bash", "-e", "-c", printed.stdout, env=env).returncode == 0
  assert (tmp_path / "bin" / "kubectl.call").read_text() == called, "the dry run prints something else"
  arguments, manifest = json.loads(called)
  return arguments, yaml.safe_load(manifest)


@pytest.mark.parametrize(
  "words, topology, chips, hosts, slices",
  [
    ([], "4x4", 4, 4, 1),
    (["--topology=16x16", "--slices=2"], "16x16", 4, 64, 2),
    (["--topology=2x4", "--chips=8"], "2x4", 8, 1, 1),
    (["--accelerator=tpu-v5p-slice", "--topology=4x4x8"], "4x4x8", 4, 32, 1),
  ],
)
def test_a_jobset_has_a_pod_for_every_host(tmp_path, words, topology, chips, hosts, slices):
  _, manifest = gke(tmp_path, *words, flags=[*FLAGS, f"--config.mesh.dcn_data={slices}"])
  (replicated,) = manifest["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert job["completions"] == job["parallelism"] == hosts and replicated["replicas"] == slices
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
  assert container["resources"]["limits"] == {"google.com/tpu": chips}


def test_a_jobset_restarts_after_preemption_and_keeps_its_files_in_the_bucket(tmp_path):
  arguments, manifest = gke(tmp_path, "--spot", "--namespace=n", "--restarts=3", "--service-account=s")
  assert arguments == ["apply", "--namespace=n", "--filename=-"]
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  policy = manifest["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 3
  assert policy["rules"] == [
    {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod, annotations = job["template"]["spec"], job["template"]["metadata"]["annotations"]
  (container,) = pod["containers"]
  assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
  assert pod["terminationGracePeriodSeconds"] >= 300 and pod["serviceAccountName"] == "s"
  disrupted, told = job["podFailurePolicy"]["rules"]
  assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
  assert told["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [143]}
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  (volume,) = pod["volumes"]
  assert annotations["gke-gcsfuse/volumes"] == "true"
  assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "b"
  assert " " not in volume["csi"]["volumeAttributes"]["mountOptions"]
  assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/storage"}]
  assert container["env"] == [{"name": "JAX_COMPILATION_CACHE_DIR", "value": "/storage/compiled"}]
  without = gke(tmp_path)[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert set(pod["nodeSelector"]) - set(without["nodeSelector"]) == {"cloud.google.com/gke-spot"}


def test_the_command_of_a_pod_starts_the_run(tmp_path, recorder):
  job = gke(tmp_path)[1]["spec"]["replicatedJobs"][0]["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  assert not [word for word in container["args"] if re.search(r"(?<!\$)(\$\$)*\$\(", word)], "that is a variable"
  storage = tmp_path / "storage"
  command = [word.replace("/storage", str(storage)) for word in container["command"]]
  command += [word.replace("$$", "$") for word in container["args"]]  # as Kubernetes does
  env = environment(recorder.parent, RECORDS=tmp_path / "records", ACTS='{"0": "wait"}')
  process = subprocess.Popen(command, env=env, cwd=ROOT)  # as in the image, where the code is
  wait_until(lambda: records(tmp_path), "the run")
  process.terminate()
  assert process.wait(30) == 143
  assert records(tmp_path)["0"]["arguments"] == ["-m", "eqm_jax.main", *FLAGS]
  assert sorted(path.name for path in storage.iterdir()) == ["data", "runs"]


def test_the_manifest_is_yaml_before_it_is_filled_in_and_nothing_is_forgotten(tmp_path):
  text = (LAUNCH / "jobset.yaml").read_text()
  assert yaml.safe_load(text)["kind"] == "JobSet"
  left = str(gke(tmp_path)[1])
  for name in set(re.findall(r"\$[A-Z_]+", text)):
    assert name not in left.replace("$$HOME", "")


def test_the_image_is_made_of_what_is_here():
  copied = [line.split()[1:-1] for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
  names = {name for sources in copied for name in sources}
  assert {"setup.py", "eqm_jax", "configs", "launch"} <= names and all((ROOT / name).exists() for name in names)
