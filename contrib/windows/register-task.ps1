<#
.SYNOPSIS
Lets the Task Scheduler wake bgtasks every 5 minutes, whether somebody is logged on or not.

.DESCRIPTION
bgtasks does not run on Windows yet: bgtasks.py ends with 69. Run this as administrator, in the folder of
bgtasks.py, with cron.cmd and task.xml beside it. To undo it: Unregister-ScheduledTask -TaskName bgtasks

.EXAMPLE
powershell -ExecutionPolicy Bypass -File register-task.ps1
#>
[CmdletBinding(SupportsShouldProcess)]
param(
    # The folder that holds bgtasks.py and cron.cmd.
    [string] $Folder = $PSScriptRoot,
    # Who runs it: the owner of the folder.
    [string] $User = "$env:USERDOMAIN\$env:USERNAME",
    # An interpreter; without it cron.cmd takes the launcher py.exe.
    [string] $Python = ''
)

Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

foreach ($name in 'bgtasks.py', 'cron.cmd', 'task.xml') {
    if (-not (Test-Path -LiteralPath (Join-Path $Folder $name))) {
        throw "$Folder has no $name; copy it there, or name the folder with -Folder"
    }
}

[xml] $task = Get-Content -Raw -LiteralPath (Join-Path $Folder 'task.xml')
$task.Task.Actions.Exec.Command = Join-Path $Folder 'cron.cmd'
$task.Task.Actions.Exec.WorkingDirectory = $Folder
if ($Python) {
    # Arguments come between Command and WorkingDirectory: the schema has an order.
    $arguments = $task.CreateElement('Arguments', $task.Task.NamespaceURI)
    $arguments.InnerText = '"' + $Python + '"'
    $exec = $task.Task.Actions.Exec
    [void] $exec.InsertBefore($arguments, $exec['WorkingDirectory'])
}

if ($PSCmdlet.ShouldProcess("$User, $Folder", 'Register the task bgtasks')) {
    Register-ScheduledTask -TaskName 'bgtasks' -Xml $task.OuterXml -User $User -Force | Out-Null
    Write-Output "bgtasks is woken every 5 minutes as $User; look at $Folder\log\cron.log"
}
