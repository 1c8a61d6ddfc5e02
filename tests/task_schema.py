"""The rules of Microsoft's schema for tasks of the Task Scheduler, as far as contrib uses them.

https://learn.microsoft.com/windows/win32/taskschd/task-scheduler-schema"""

XSD = """\
<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema" elementFormDefault="qualified"
    xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task"
    targetNamespace="http://schemas.microsoft.com/windows/2004/02/mit/task">
  <xs:element name="Task">
    <xs:complexType>
      <xs:all>
        <xs:element name="RegistrationInfo" minOccurs="0"><xs:complexType><xs:all>
          <xs:element name="URI" type="xs:anyURI" minOccurs="0"/>
          <xs:element name="Author" type="xs:string" minOccurs="0"/>
          <xs:element name="Description" type="xs:string" minOccurs="0"/>
          <xs:element name="Version" type="xs:string" minOccurs="0"/>
        </xs:all></xs:complexType></xs:element>
        <xs:element name="Triggers" minOccurs="0"><xs:complexType>
          <xs:choice minOccurs="0" maxOccurs="48">
            <xs:element name="TimeTrigger"><xs:complexType><xs:sequence>
              <xs:element name="Enabled" type="xs:boolean" minOccurs="0"/>
              <xs:element name="StartBoundary" type="xs:dateTime"/>
              <xs:element name="EndBoundary" type="xs:dateTime" minOccurs="0"/>
              <xs:element name="Repetition" minOccurs="0"><xs:complexType><xs:all>
                <xs:element name="Interval"><xs:simpleType>
                  <xs:restriction base="xs:duration">
                    <xs:minInclusive value="PT1M"/><xs:maxInclusive value="P31D"/>
                  </xs:restriction></xs:simpleType></xs:element>
                <xs:element name="Duration" type="xs:duration" minOccurs="0"/>
                <xs:element name="StopAtDurationEnd" type="xs:boolean" minOccurs="0"/>
              </xs:all></xs:complexType></xs:element>
              <xs:element name="ExecutionTimeLimit" type="xs:duration" minOccurs="0"/>
              <xs:element name="RandomDelay" type="xs:duration" minOccurs="0"/>
            </xs:sequence><xs:attribute name="id" type="xs:ID"/></xs:complexType></xs:element>
          </xs:choice></xs:complexType></xs:element>
        <xs:element name="Principals" minOccurs="0"><xs:complexType><xs:sequence>
          <xs:element name="Principal"><xs:complexType><xs:all>
            <xs:element name="UserId" type="xs:string" minOccurs="0"/>
            <xs:element name="LogonType" minOccurs="0"><xs:simpleType>
              <xs:restriction base="xs:string">
                <xs:enumeration value="S4U"/><xs:enumeration value="Password"/>
                <xs:enumeration value="InteractiveToken"/>
                <xs:enumeration value="InteractiveTokenOrPassword"/>
              </xs:restriction></xs:simpleType></xs:element>
            <xs:element name="GroupId" type="xs:string" minOccurs="0"/>
            <xs:element name="DisplayName" type="xs:string" minOccurs="0"/>
            <xs:element name="RunLevel" minOccurs="0"><xs:simpleType>
              <xs:restriction base="xs:string">
                <xs:enumeration value="LeastPrivilege"/><xs:enumeration value="HighestAvailable"/>
              </xs:restriction></xs:simpleType></xs:element>
          </xs:all><xs:attribute name="id" type="xs:ID"/></xs:complexType></xs:element>
        </xs:sequence></xs:complexType></xs:element>
        <xs:element name="Settings" minOccurs="0"><xs:complexType><xs:all>
          <xs:element name="AllowStartOnDemand" type="xs:boolean" minOccurs="0"/>
          <xs:element name="MultipleInstancesPolicy" minOccurs="0"><xs:simpleType>
            <xs:restriction base="xs:string">
              <xs:enumeration value="Parallel"/><xs:enumeration value="Queue"/>
              <xs:enumeration value="IgnoreNew"/><xs:enumeration value="StopExisting"/>
            </xs:restriction></xs:simpleType></xs:element>
          <xs:element name="DisallowStartIfOnBatteries" type="xs:boolean" minOccurs="0"/>
          <xs:element name="StopIfGoingOnBatteries" type="xs:boolean" minOccurs="0"/>
          <xs:element name="AllowHardTerminate" type="xs:boolean" minOccurs="0"/>
          <xs:element name="StartWhenAvailable" type="xs:boolean" minOccurs="0"/>
          <xs:element name="WakeToRun" type="xs:boolean" minOccurs="0"/>
          <xs:element name="Enabled" type="xs:boolean" minOccurs="0"/>
          <xs:element name="Hidden" type="xs:boolean" minOccurs="0"/>
          <xs:element name="ExecutionTimeLimit" type="xs:duration" minOccurs="0"/>
          <xs:element name="Priority" minOccurs="0"><xs:simpleType>
            <xs:restriction base="xs:byte">
              <xs:minInclusive value="0"/><xs:maxInclusive value="10"/>
            </xs:restriction></xs:simpleType></xs:element>
        </xs:all></xs:complexType></xs:element>
        <xs:element name="Actions"><xs:complexType>
          <xs:choice maxOccurs="32">
            <xs:element name="Exec"><xs:complexType><xs:sequence>
              <xs:element name="Command" type="xs:string"/>
              <xs:element name="Arguments" type="xs:string" minOccurs="0"/>
              <xs:element name="WorkingDirectory" type="xs:string" minOccurs="0"/>
            </xs:sequence><xs:attribute name="id" type="xs:ID"/></xs:complexType></xs:element>
          </xs:choice><xs:attribute name="Context" type="xs:IDREF"/></xs:complexType></xs:element>
      </xs:all>
      <xs:attribute name="version"><xs:simpleType>
        <xs:restriction base="xs:string"><xs:pattern value="\\d+(\\.\\d+){1,3}"/></xs:restriction>
      </xs:simpleType></xs:attribute>
    </xs:complexType>
  </xs:element>
</xs:schema>
"""
