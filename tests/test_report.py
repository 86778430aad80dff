"""What a report says is arithmetic on labels, answers and margins."""

import json

import pytest
import timm
import torch

from timm_robust import cli
from timm_robust.data import load_dataset
from timm_robust.report import Report, examine
from timm_robust.threat_model import ThreatModel

FOUND = Report(
    y=torch.tensor([0, 0, 1, 1, 1]),
    y_pred=torch.tensor([0, 1, 1, 1, 0]),
    y_pred_adv=torch.tensor([1, 1, 1, 0, 1]),  # the last is right under attack, and wrong as it is
    x_adv=torch.zeros(5, 1, 8, 8),
    margin=torch.tensor([-1.0, -3.0, 2.0, -2.0, 1.0]),
    classes=('cat', 'dog'),
)


def test_an_image_resists_if_it_is_right_as_it_is_and_under_attack():
    assert FOUND.robust.tolist() == [False, False, True, False, False]
    record = FOUND.record()
    assert (record['n'], record['clean_acc'], record['pgd_acc']) == (5, 0.6, 0.2)


def test_confusion_counts_labels_against_answers():
    assert FOUND.confusion(False).tolist() == [[1, 1], [1, 2]]
    assert FOUND.confusion(True).tolist() == [[0, 2], [1, 2]]


def test_the_worst_class_comes_first_with_what_it_is_taken_for():
    _, cat, dog, total = FOUND.lines()
    assert cat.split() == ['cat', '2', '50.0%', '0.0%', 'dog', '(1);', 'dog', '(2)']
    assert dog.split() == ['dog', '3', '66.7%', '33.3%', 'cat', '(1);', 'cat', '(1)']
    assert total.split() == ['all', '5', '60.0%', '20.0%']


def test_extremes_are_sorted_by_margin():
    easiest, hardest = FOUND.extremes(2)
    assert easiest.tolist() == [2, 4] and hardest.tolist() == [1, 3]


def test_margins_are_those_of_adversarial_images_inside_the_ball():
    model = timm.create_model('resnet18_silu', width=4, num_classes=10).eval()
    data = load_dataset('digits', split='test').first(6)
    found = examine(model, data, ThreatModel('Linf', 0.1), steps=2, batch_size=4)
    assert (found.x_adv - data.pixels()).abs().max() <= 0.1 + 1e-6
    with torch.no_grad():
        output = model(found.x_adv)
    for number, label in enumerate(data.labels.tolist()):
        others = [output[number, other].item() for other in range(10) if other != label]
        assert found.margin[number].item() == pytest.approx(output[number, label].item() - max(others), abs=1e-4)
    assert torch.equal(found.margin > 0, found.y_pred_adv == data.labels)


def test_logits_that_are_nan_are_no_report():
    model = timm.create_model('resnet18_silu', width=4, num_classes=10).eval()
    with torch.no_grad():
        model.fc.bias[3] = torch.nan
    with pytest.raises(ValueError, match='NaN on 6 of 6 images'):
        examine(model, load_dataset('digits', split='test').first(6), ThreatModel('Linf', 0.1), steps=2)


def test_a_model_of_other_classes_is_no_report():
    model = timm.create_model('resnet18_silu', width=4, num_classes=20).eval()
    with pytest.raises(ValueError, match='the model has 20 outputs, digits has 10 classes'):
        examine(model, load_dataset('digits', split='test').first(6), ThreatModel('Linf', 0.1), steps=2)


def test_the_command_reports_what_the_run_held_out(tmp_path, capsys):
    settings = ['--model', 'resnet18_silu', '--model-kwargs', 'width=4', '--dataset', 'digits', '--eps', '0.1']
    settings += ['--steps', '1', '--eval-steps', '1', '--val-size', '0.02', '--max-steps', '2', '--device', 'cpu']
    train = ['train', *settings, '--batch-size', '20', '--output', str(tmp_path), '--experiment', 'run']
    assert cli.main(train) == 0
    assert f'timm-robust report {tmp_path / "run"}' in capsys.readouterr().err
    assert cli.main(['report', str(tmp_path / 'run'), '--steps', '2']) == 0
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record['n'] == round(0.02 * 1437) == sum(map(sum, record['confusion']))
    assert (tmp_path / 'run/report.png').read_bytes().startswith(b'\x89PNG')
    file = tmp_path / 'record.json'
    evaluate = ['evaluate', str(tmp_path / 'run'), '--split', 'held_out', '--attack', 'none', '--quiet']
    assert cli.main([*evaluate, '--results-file', str(file)]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (measured['n'], measured['split'], measured['clean_acc']) == (record['n'], 'held_out', record['clean_acc'])
    assert cli.main(['evaluate', str(tmp_path / 'run'), '--repeat', str(file), '--quiet']) == 0
    capsys.readouterr()
    assert cli.main(['report', str(tmp_path / 'run'), '-o', str(tmp_path / 'no/where.png')]) == 2
    assert 'mkdir -p' in capsys.readouterr().err
    assert cli.main(['report', str(tmp_path / 'run'), '--eps', '0']) == 2
